"""Several adapters made one, against PEFT's ``add_weighted_adapter``, and what cannot be combined."""

from dataclasses import replace

import numpy as np
import pytest

from tunemill.errors import BadDataError, UsageError
from tunemill.merge.combine import dare_mask
from tunemill.merge.config import STAGE, MergeConfig
from tunemill.merge.merge import merge
from tunemill.recipe import Choice, resolve
from tunemill.stages import known_keys
from tunemill.work import Input

TARGETS = (["q_proj", "up_proj", "embed_tokens"], ["q_proj", "down_proj", "embed_tokens"], ["q_proj"])
HOW = {
    "linear": {},
    "cat": {},
    "svd": {},
    "svd-of-rank-3": {"combination_type": "svd", "svd_rank": 3},
    "ties": {"density": 0.5},
    "ties-by-frequency": {"combination_type": "ties", "density": 0.3, "majority_sign_method": "frequency"},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.7},
    "dare_ties-of-all": {"combination_type": "dare_ties", "density": 1.0},
    "magnitude_prune": {"density": 0.4},
}


@pytest.fixture
def adapters(tmp_path, models):
    """Save three adapters of one base, which overlap."""

    def make(dtype="float32", architecture="Llama", targets=TARGETS, **settings):
        base = models.tiny(architecture, tmp_path / "base", dtype)
        saved = [
            models.random_adapter(
                models.load(base),
                tmp_path / f"adapter-{place}",
                seed=place,
                target_modules=target,
                lora_alpha=4 + place,
                **({"r": 4} | settings),
            )
            for place, target in enumerate(targets)
        ]
        return base, saved

    return make


@pytest.fixture
def several(work):
    """Build the Work of a merge of several adapters."""

    def build(base, saved, weights=(0.7, -0.4, 1.1), **config):
        config = MergeConfig(
            adapters=[path.name for path in saved], adapter_weights=weights[: len(saved)], **config
        )
        inputs = {
            f"adapter-{place}": Input(f"t/{path.name}@sha256:{place}", str(place), "adapter", path, {})
            for place, path in enumerate(saved)
        }
        plain = work(base, saved[0])
        return replace(plain, config=config, inputs={"base": plain.inputs["base"], **inputs})

    return build


def combined_by_peft(models, base, saved, weights, how, monkeypatch):
    """Return PEFT's merge; where it draws a mask, it is given ours."""
    import torch
    from peft import PeftModel
    from peft.utils import merge_utils

    model = PeftModel.from_pretrained(models.load(base), saved[0], adapter_name="of0")
    for place, path in enumerate(saved[1:], 1):
        model.load_adapter(path, adapter_name=f"of{place}")
    names = {
        parameter.data_ptr(): (name, place)
        for place in range(len(saved))
        for name, parameter in model.named_parameters()
        if f".of{place}" in name
    }

    def pruned(tensor, density, rescale):
        name, place = names[tensor.data_ptr()]
        name = name.replace(f".of{place}", "")
        # Of the adapters that change a tensor, ours counts those alone.
        mask = masks(name, place, tensor.shape, density)
        return tensor * torch.from_numpy(mask).to(tensor.dtype) / density

    def masks(name, place, shape, density):
        have = [other for other in range(len(saved)) if (name, other) in known]
        return dare_mask(tuple(shape), density, 0, f"{have.index(place)} {name}")

    known = {(name.replace(f".of{place}", ""), place) for name, place in names.values()}
    monkeypatch.setattr(merge_utils, "random_pruning", pruned)
    model.add_weighted_adapter([f"of{place}" for place in range(len(saved))], list(weights), "all", **how)
    model.set_adapter("all")
    return model.merge_and_unload()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", HOW)
def test_equals_pefts_combination(tmp_path, models, adapters, several, monkeypatch, case, dtype):
    if (case, dtype) == ("cat", "bfloat16"):
        pytest.skip("PEFT rounds the factors of cat to the base's type, and so the result more than once")
    how = {"combination_type": case} | HOW[case]
    base, saved = adapters(dtype)
    weights = (0.7, -0.4, 1.1)
    facts = merge(several(base, saved, weights, **how))
    combined_by_peft(models, base, saved, weights, how, monkeypatch).save_pretrained(tmp_path / "peft")
    ours, theirs, before = (models.read(tmp_path / name) for name in ("out", "peft", "base"))
    assert models.compare(ours, theirs, before, dtype) == facts["tensors_changed"] > 0
    assert facts["adapters"] == 3


def test_transposed_layers(tmp_path, models, adapters, several, monkeypatch):
    base, saved = adapters(architecture="GPT2", targets=(["c_attn"], ["c_attn"]), fan_in_fan_out=True)
    how = {"combination_type": "ties", "density": 0.5}
    merge(several(base, saved, **how))
    combined_by_peft(models, base, saved, (0.7, -0.4), how, monkeypatch).save_pretrained(tmp_path / "peft")
    ours, theirs, before = (models.read(tmp_path / name) for name in ("out", "peft", "base"))
    assert models.compare(ours, theirs, before, "float32") == 2


def test_ranks_may_differ_where_products_are_added(tmp_path, models, adapters, several, monkeypatch):
    base, saved = adapters(targets=TARGETS[:2], rank_pattern={"q_proj": 2})
    merge(several(base, saved, combination_type="cat"))
    combined_by_peft(
        models, base, saved, (0.7, -0.4), {"combination_type": "cat"}, monkeypatch
    ).save_pretrained(tmp_path / "peft")
    ours, theirs, before = (models.read(tmp_path / name) for name in ("out", "peft", "base"))
    models.compare(ours, theirs, before, "float32")


def test_masks_are_what_they_claim():
    """Density, independence of tensors and seeds, and the same mask every time."""
    shape = (400, 500)
    masks = {key: dare_mask(shape, 0.3, *key) for key in ((0, "a"), (0, "b"), (1, "a"))}
    for mask in masks.values():
        assert abs(mask.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / mask.size)
    first = masks.pop((0, "a"))
    for mask in masks.values():
        both = (mask & first).mean()
        assert abs(both - 0.09) < 5 * np.sqrt(0.09 * 0.91 / mask.size)
    assert np.array_equal(first, dare_mask(shape, 0.3, 0, "a"))


def test_the_seed_changes_the_result(models, tmp_path, adapters, several):
    base, saved = adapters(targets=TARGETS[:2])
    how = {"combination_type": "dare_linear", "density": 0.5}
    found = []
    for seed in (1, 1, 2):
        this = several(base, saved, dare_seed=seed, **how)
        merge(this)
        found.append((this.output / "model.safetensors").read_bytes())
        this.output.rename(tmp_path / f"out-{len(found)}")
    assert found[0] == found[1] != found[2]


REFUSED = {
    "dora": ({"use_dora": True}, "more to .* than add"),
    "modules-to-save": ({"modules_to_save": ["lm_head"]}, "more to lm_head"),
    "tokens": ({"trainable_token_indices": [3]}, "more to .* than add"),
    "rslora": ({"use_rslora": True}, "rsLoRA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined(adapters, several, case):
    settings, words = REFUSED[case]
    base, saved = adapters(targets=(["q_proj"], ["q_proj"]), **settings)
    this = several(base, saved)
    with pytest.raises(BadDataError, match=words):
        merge(this)
    assert not list(this.output.iterdir())


def test_ranks_that_differ(models, tmp_path, adapters, several):
    base, saved = adapters(targets=(["q_proj"],))
    other = models.random_adapter(models.load(base), tmp_path / "other", r=2, target_modules=["q_proj"])
    with pytest.raises(BadDataError, match=r"one rank.*4, 2"):
        merge(several(base, [*saved, other]))


def configured(*settings):
    choice = Choice(model="tiny", task="stdlib", settings=settings)
    return resolve(choice, known_keys()).configure(STAGE)


def test_the_inputs_are_those_that_the_recipe_names():
    config = configured("adapters=[a/adapter, 'b/adapter:best']", "adapter_weights=[1, -0.5]")
    assert STAGE.templates(config) == {
        "base": "base/{model}",
        "adapter-0": "a/adapter",
        "adapter-1": "b/adapter:best",
    }
    assert STAGE.templates(configured()) == {"base": "base/{model}", "adapter": "{run}/adapter"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["adapters=[a/b, c/d]"], "give each adapter one"),
        (["adapters=['a/{b}']", "adapter_weights=[1]"], "adapters"),
        (["adapters=[a/b, c/d]", "adapter_weights=[1, .nan]"], "numbers"),
        (["adapters=[a/b, c/d]", "adapter_weights=[1, 1]", "combination_type=ties"], "needs density"),
        (["density=0"], "density"),
        (["combination_type=ties_svd"], "combination_type"),
    ],
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(UsageError, match=words):
        configured(*settings)
