"""How adapters are read: names old and raw, patterns, convolutions, and experts of models not known."""

import json

import pytest

from tunemill.errors import BadDataError
from tunemill.merge.adapter import read_adapter
from tunemill.merge.merge import merge
from tunemill.merge.patterns import first_matches

MODULES = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "use_dora": True}


@pytest.fixture
def pair(tmp_path, models):
    base = models.tiny_llama(tmp_path / "base", "bfloat16")
    return base, models.random_adapter(models.load(base), tmp_path / "adapter", r=4, lora_alpha=8, **MODULES)


def rename(adapter, change):
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_names_of_a_raw_state_dict(pair):
    """Saved by hand, names have the adapter's in them, and modules_to_save their wrapper's."""
    wanted = read_adapter(pair[1]).changes

    def raw(name):
        for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            name = name.replace(f".{part}", f".{part}.default")
        name = name.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
        return name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")

    rename(pair[1], raw)
    found = read_adapter(pair[1]).changes
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        assert [source.shape for source in found[name].sources()] == [s.shape for s in change.sources()]
        assert len(change.sources()) == len(found[name].sources()) > 0


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        pytest.param(r"([a-z_.0-9]+)+!", "above 1 s", id="nested"),
        pytest.param(r"((\w+)+\.?)+!", "above 1 s", id="overlapping"),
        pytest.param("((a{999}){999}){999}{999}", "adapter_config.json", id="counted"),
        pytest.param("a" * 300, "300 characters", id="long"),
        pytest.param(r"(", "no regular expressions", id="broken"),
        pytest.param("(?<name>" * 3, "no regular expressions", id="not-python's"),
    ],
)
def test_patterns_that_cannot_be_used(pair, work, monkeypatch, pattern, words):
    monkeypatch.setattr("tunemill.merge.patterns.SECONDS", 1)
    edit(pair[1] / "adapter_config.json", rank_pattern={pattern: 4})
    with pytest.raises(BadDataError, match=words) as caught:
        merge(work(*pair))
    assert "adapter_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_deep_pattern_is_bounded_too():
    assert first_matches(["(" * 40 + "a" + ")+" * 40, r"b.*\.c$"], ["x.aaa", "b.c", "bcc"])[1:] == [
        r"b.*\.c$",
        None,
    ]


def test_experts_of_a_model_that_is_not_known(tmp_path, models, work):
    base = models.tiny("Mixtral", tmp_path / "base", "float32", num_local_experts=2)
    adapter = models.random_adapter(
        models.load(base), tmp_path / "a", r=2, target_modules=[], target_parameters=["experts.down_proj"]
    )
    edit(base / "config.json", model_type="made_up")
    with pytest.raises(BadDataError, match=r"'made_up'.*mixtral"):
        merge(work(base, adapter))


def test_experts_of_another_base(tmp_path, models, work):
    base = models.tiny("Mixtral", tmp_path / "base", "float32", num_local_experts=2)
    other = models.tiny("Mixtral", tmp_path / "other", "float32", num_local_experts=3)
    adapter = models.random_adapter(
        models.load(base), tmp_path / "a", r=2, target_modules=[], target_parameters=["experts.down_proj"]
    )
    with pytest.raises(BadDataError, match="another base"):
        merge(work(other, adapter))


def test_dora_on_a_row_of_zeros(tmp_path, models, work):
    from safetensors.torch import load_file, save_file

    base = models.tiny_llama(tmp_path / "base", "float32")
    adapter = models.random_adapter(
        models.load(base), tmp_path / "adapter", r=4, target_modules=["q_proj"], use_dora=True
    )
    for path, name in (
        (base / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"),
        (
            adapter / "adapter_model.safetensors",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        ),
    ):
        tensors = load_file(path)
        tensors[name][5] = 0
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(BadDataError, match="DoRA on a row of the base that is zero"):
        merge(work(base, adapter))


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions(tmp_path, models, work, use_dora):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import save_file

    class Convolutions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"tie_word_embeddings": False}
            self.line = torch.nn.Conv1d(6, 10, 3)
            self.plane = torch.nn.Conv2d(5, 8, (3, 2))
            self.point = torch.nn.Conv2d(5, 8, 1)

    def build():
        torch.manual_seed(2)
        return Convolutions()

    base = tmp_path / "base"
    base.mkdir()
    save_file(build().state_dict(), base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text("{}")
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["line", "plane", "point"], use_dora=use_dora)
    peft_model = get_peft_model(build(), settings)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(0, 0.3)
            elif "magnitude" in name:
                parameter.mul_(1.1)
    peft_model.save_pretrained(tmp_path / "adapter")
    facts = merge(work(base, tmp_path / "adapter"))
    theirs = PeftModel.from_pretrained(build(), tmp_path / "adapter").merge_and_unload().state_dict()
    ours, before = models.read(tmp_path / "out"), models.read(base)
    assert models.compare(ours, theirs, before, "float32") == facts["tensors_changed"] == 3
