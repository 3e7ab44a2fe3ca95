"""Injected faults, each caught by the stage that could first see it; the same run without them passes.

A Llama of two layers is trained to name a label, and goes through merge, convert and quantize as it would
in a pipeline. Each fault changes one artifact between two stages, as a mix-up would.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunemill.errors import BadDataError, ConfigurationError, IntegrityError
from tunemill.gguf.config import ConvertConfig, QuantizeConfig
from tunemill.gguf.convert import convert
from tunemill.gguf.header import read_gguf
from tunemill.gguf.library import Library
from tunemill.gguf.quantize import quantize
from tunemill.merge.config import MergeConfig
from tunemill.merge.merge import merge
from tunemill.parity.distributions import Distributions
from tunemill.parity.probes import Probes
from tunemill.progress import Progress
from tunemill.store import open_store
from tunemill.store.push import draft
from tunemill.work import Input, Work

from .toy import make_base, make_data, train_adapter

QUANT = "Q4_K_M"
QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Lab:
    """Stages run one by one on directories."""

    root: Path
    base: Path
    data: Path
    adapter: Path
    trained: dict

    def merge(self, adapter: Path | None = None, base: Path | None = None, **config) -> tuple[Path, dict]:
        """Merge as an adapter from elsewhere is merged, of which nobody recorded the base."""
        return self._run(
            merge, MergeConfig(n_threads=1, **config), base=base or self.base, adapter=adapter or self.adapter
        )

    def convert(self, merged: Path, **config) -> tuple[Path, dict]:
        return self._run(convert, ConvertConfig(**config), merged=merged, data=self.data)

    def quantize(self, gguf: Path, **config) -> tuple[Path, dict]:
        return self._run(quantize, QuantizeConfig(quant=QUANT, n_threads=1, **config), gguf=gguf)

    def copy(self, directory: Path) -> Path:
        return Path(shutil.copytree(directory, self.fresh("copy")))

    def fresh(self, name: str) -> Path:
        return self.root / f"{name}{len(list(self.root.iterdir()))}"

    def _run(self, stage, config, **inputs) -> tuple[Path, dict]:
        output = self.fresh("out")
        output.mkdir()
        given = {
            role: Input(f"t/{role}@sha256:{'a' * 64}", "c" * 64, role, path, {})
            for role, path in inputs.items()
        }
        work = Work(config, given, output, self.fresh("scratch"), QUIET, SimpleNamespace())
        return output, stage(work)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    root = tmp_path_factory.mktemp("parity")
    (root / "runs").mkdir()
    base, data = make_base(root / "base", seed=1), make_data(root / "data")
    adapter, facts = train_adapter(root / "train", base, data)
    return Lab(root / "runs", base, data, adapter, facts)


@pytest.fixture(scope="module")
def merged(lab) -> Path:
    return lab.merge()[0]


@pytest.fixture(scope="module")
def converted(lab, merged) -> Path:
    return lab.convert(merged)[0]


def caught(stage: str, run, *words: str) -> str:
    """Expect one line from ``stage`` that has all ``words`` in it."""
    with pytest.raises(BadDataError) as error:
        run()
    line = str(error.value)
    assert line.startswith(f"{stage}: parity is lost: "), line
    assert error.value.exit_code == 65
    assert "\n" not in line
    assert [word for word in words if word not in line] == [], line
    return line


def test_the_toy_learned_something(lab):
    """Else the faults below would change nothing that matters."""
    probes, reference = Probes.load(lab.adapter), Distributions.load(lab.adapter)
    right = [row.argmax() == probe.label for row, probe in zip(reference.labels, probes.probes, strict=True)]
    assert sum(right) >= 0.8 * len(right)
    assert lab.trained["parity"]["probe_set"] == probes.digest


def test_a_clean_run_passes_at_every_stage(lab):
    output, facts = lab.merge()
    found = {"merge": facts["parity"]}
    output, facts = lab.convert(output)
    found["convert"] = facts["parity"]
    output, facts = lab.quantize(output)
    found["quantize"] = facts["parity"]
    assert {verdict["verdict"] for verdict in found.values()} == {"passed"}
    assert found["merge"]["mean_kl"] < 1e-3
    assert found["convert"]["mean_kl"] < 1e-4
    assert found["convert"]["mean_kl"] < found["quantize"]["mean_kl"] < 0.1
    assert {verdict["probes"] for verdict in found.values()} == {24}
    for name in ("probes.json", "parity.npz", "parity.json"):
        assert (output / name).exists()


def test_a_wrong_base_is_caught_by_merge(lab):
    other = make_base(lab.fresh("base"), seed=2)
    caught("merge", lambda: lab.merge(base=other), "mean KL", "another base than the adapter was trained on")


def test_an_adapter_scaled_twice_is_caught_by_merge(lab):
    adapter = lab.copy(lab.adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    caught("merge", lambda: lab.merge(adapter), "mean KL", "an adapter scaled wrongly")


def test_an_adapter_merged_twice_is_caught_by_merge(lab, merged):
    caught("merge", lambda: lab.merge(base=merged), "merged twice")


def test_a_transposed_tensor_of_the_base_is_caught_by_merge(lab):
    base = lab.copy(lab.base)
    transpose(base, "model.layers.0.self_attn.q_proj.weight")
    caught("merge", lambda: lab.merge(base=base), "a tensor transposed")


def test_a_shard_of_another_run_is_caught_by_convert(lab, merged):
    adapter = lab.copy(lab.adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": -config["lora_alpha"]}))
    other, facts = lab.merge(adapter, publish_anyway=True)
    assert facts["parity"]["verdict"] == "overridden"
    mixed = lab.copy(merged)
    shards = sorted(mixed.glob("*.safetensors"))
    assert len(shards) > 2
    shutil.copyfile(other / shards[1].name, shards[1])
    caught("convert", lambda: lab.convert(mixed), "a shard of another run")


@pytest.mark.parametrize(
    ("written", "words"),
    [
        pytest.param("{{ bos_token }}{{ bos_token }}", ["twice", "a doubled BOS"], id="doubled BOS"),
        pytest.param("", ["no longer begins with <s>", "a dropped BOS"], id="dropped BOS"),
        pytest.param("{{ bos_token }}file", ["another chat template", "first at token 1"], id="template"),
    ],
)
def test_another_way_of_asking_is_caught_by_the_next_stage(lab, converted, written, words):
    ask_otherwise(adapter := lab.copy(lab.adapter), written)
    caught("merge", lambda: lab.merge(adapter), *words)
    ask_otherwise(gguf := lab.copy(converted), written)
    caught("quantize", lambda: lab.quantize(gguf), *words)


def test_another_chat_template_is_caught_by_convert(lab, merged):
    ask_otherwise(changed := lab.copy(merged), "{{ bos_token }}file")
    caught("convert", lambda: lab.convert(changed), "another chat template")


def test_a_flipped_high_bit_of_a_quantized_tensor_is_caught(lab, converted, monkeypatch):
    """As memory or a disk may do between the quantizer and the proof."""
    damage_quantizer(monkeypatch, lambda path: flip(path, scale=True))
    caught("quantize", lambda: lab.quantize(converted), "a damaged tensor")


def test_a_flipped_low_bit_is_within_the_limits_and_the_store_notices_it(lab, converted, monkeypatch):
    clean, facts = lab.quantize(converted)
    damage_quantizer(monkeypatch, lambda path: flip(path, scale=False))
    _, flipped = lab.quantize(converted)
    assert flipped["parity"]["verdict"] == "passed"
    assert abs(flipped["parity"]["mean_kl"] - facts["parity"]["mean_kl"]) < 1e-3
    store, artifact = publish(clean, lab.fresh("store"))
    digest = next(file.digest for file in artifact.files if file.path.endswith(".gguf"))
    blob = next(path for path in lab.root.rglob(f"*{digest}*") if "blobs" in path.parts)
    blob.chmod(0o644)
    flip(blob, scale=False)
    with pytest.raises(IntegrityError):
        store.pull(artifact, lab.fresh("pulled"), QUIET)


def test_an_adapter_without_probes_is_merged_with_that_on_record(lab):
    adapter = lab.copy(lab.adapter)
    for name in ("probes.json", "parity.npz"):
        (adapter / name).unlink()
    output, facts = lab.merge(adapter)
    assert facts["parity"]["verdict"] == "none"
    assert not (output / "parity.npz").exists()


def test_a_transposed_tensor_is_caught_by_convert_also_where_merge_proved_nothing(lab):
    output, facts = lab.merge(parity_probes=0)
    assert facts["parity"] == {"verdict": "off"}
    transpose(output, "model.layers.0.self_attn.v_proj.weight")
    caught("convert", lambda: lab.convert(output), "transposed")


def test_without_torch_merge_says_what_to_install(monkeypatch):
    from tunemill.merge import parity

    parity.check(MergeConfig())
    monkeypatch.setattr(parity, "NEEDED", ("torch", "no_such_library"))
    with pytest.raises(
        ConfigurationError, match=r"no_such_library is missing: pip install .*parity_probes=0"
    ):
        parity.check(MergeConfig())
    parity.check(MergeConfig(parity_probes=0))


def test_a_limit_of_the_recipe_counts(lab, converted):
    line = caught("quantize", lambda: lab.quantize(converted, quantize_max_mean_kl=1e-9), "mean KL")
    assert "is over quantize_max_mean_kl=1e-09" in line


def transpose(directory: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            assert tensors[name].shape[0] == tensors[name].shape[1]
            tensors[name] = tensors[name].T.contiguous()
            path.unlink()
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(f"no {name}")


def ask_otherwise(directory: Path, written: str) -> None:
    path = directory / "prompting.json"
    prompting = json.loads(path.read_text())
    template = prompting["chat_template"].replace("{{ bos_token }}", written)
    path.unlink()
    path.write_text(json.dumps({**prompting, "chat_template": template, "add_bos": False}))


def damage_quantizer(monkeypatch, damage) -> None:
    quantizer = Library.quantize

    def damaged(self, source, target, *arguments):
        answer = quantizer(self, source, target, *arguments)
        damage(target)
        return answer

    monkeypatch.setattr(Library, "quantize", damaged)


def flip(path: Path, scale: bool) -> None:
    """Flip a high bit of the scale of one block of ``blk.0.ffn_down``, or the lowest bit of one weight.

    Where a block's scale is, as two bytes of float16: ``block_q4_K`` and ``block_q6_K`` in ggml-common.h.
    """
    tensor = next(one for one in read_gguf(path).tensors if one.name == "blk.0.ffn_down.weight")
    size, place = {"Q4_K": (144, 0), "Q6_K": (210, 208)}[tensor.type]
    with path.open("r+b") as file:
        file.seek(tensor.start + 7 * size + (place if scale else size // 2))
        (value,) = struct.unpack("<H", file.read(2))
        file.seek(-2, 1)
        file.write(struct.pack("<H", value ^ (0x4000 if scale else 1)))


def publish(directory: Path, store: Path):
    """Publish a quantization in a new store."""
    opened = open_store(str(store), create=True)
    return opened, opened.publish(draft(opened, directory, "toy/gguf-q4_k_m", "gguf", (), {}, {}), QUIET)
