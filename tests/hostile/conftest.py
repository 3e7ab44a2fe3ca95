"""A store with whole artifacts, and a way to put a hostile one in their place and see what happens."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import provenance
from pieces import TEMPLATE, WORDS, sentencepiece_model, tokenizer_config
from tunemill.progress import Progress
from tunemill.store import Draft, open_store

SECONDS = 15.0  # of processor time: what it takes by the clock is the other processes' doing
PATIENCE = 300.0  # by the clock
MEMORY = 1_500_000_000
WARD = Path(__file__).with_name("ward.py")
VOCABULARY = 400
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
Q = "model.layers.0.self_attn.q_proj"


def safetensors(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Write by the format's own rules, so that tests can damage it by hand."""
    header, data = {}, b""
    for name, array in arrays.items():
        written = array.astype("<f4").tobytes()
        place = [len(data), len(data) + len(written)]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": place}
        data += written
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def weights() -> dict[str, np.ndarray[Any, Any]]:
    layer, wide, tall = "model.layers.0", np.ones((32, 16)), np.ones((16, 32))
    names = {f"{layer}.self_attn.{p}_proj.weight": np.ones((16, 16)) for p in "qkvo"}
    names |= {f"{layer}.mlp.{p}_proj.weight": wide for p in ("gate", "up")}
    names |= {f"{layer}.mlp.down_proj.weight": tall, "model.norm.weight": np.ones(16)}
    names |= {f"{layer}.{n}.weight": np.ones(16) for n in ("input_layernorm", "post_attention_layernorm")}
    return {"model.embed_tokens.weight": np.ones((VOCABULARY, 16)), **names}


def adapter_weights() -> dict[str, np.ndarray[Any, Any]]:
    name = f"base_model.model.{Q}"
    return {f"{name}.lora_A.weight": np.ones((2, 16)), f"{name}.lora_B.weight": np.ones((16, 2))}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``adapter`` and ``data``: inputs that nothing is wrong with."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("whole")
    base, adapter, data = (root / name for name in ("base", "adapter", "data"))
    for directory in (base, adapter, data):
        directory.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG))
    (base / "tokenizer.model").write_bytes(sentencepiece_model())
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    (base / "model.safetensors").write_bytes(safetensors(weights()))
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (adapter / "adapter_model.safetensors").write_bytes(safetensors(adapter_weights()))
    chance = random.Random(3)
    texts = [" ".join(chance.choices(WORDS, k=9)) for _ in range(40)]
    rows = [
        {"id": t, "prompt": [{"role": "user", "content": t}], "completion": "A", "text": t, "label": "A"}
        for t in texts
    ]
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows), data / f"{split}.parquet")
    (data / "task.json").write_text('{"form": "label"}')
    (data / "labels.json").write_text('[{"name": "A"}, {"name": "B"}]')
    (root / "rows.csv").write_text(
        "text,label\n" + "".join(f"{t},{'AB'[n % 2]}\n" for n, t in enumerate(texts))
    )
    return root


ROLES = {
    "prepare": ("base",),
    "merge": ("base", "adapter"),
    "convert": ("merged", "data"),
    "convert-lora": ("base", "adapter"),
    "quantize": ("gguf",),
    "infer": ("gguf", "data"),
}
WHOLE = {
    "base": "base/whole",
    "merged": "whole/merged",
    "adapter": "whole/adapter",
    "data": "whole/data",
    "gguf": "whole/gguf-f32",
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    seconds: float
    """Of processor time, its children's included."""
    peak: int
    """Most bytes that it or a child held."""
    errors: str


@pytest.fixture(scope="session")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str], Path], Ended]]:
    environment = {
        **os.environ,
        "TUNEMILL_CACHE": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.Popen(
        [sys.executable, str(WARD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"

    def run(arguments: list[str], directory: Path) -> Ended:
        case = {"arguments": arguments, "directory": str(directory), "seconds": PATIENCE}
        print(json.dumps(case), file=child.stdin, flush=True)
        answer = json.loads(child.stdout.readline())
        return Ended(**answer, errors=(directory / "stderr").read_text())

    yield run
    child.stdin.close()
    child.wait()


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Any:
    store = open_store(str(tmp_path_factory.mktemp("shop") / "store"), create=True)
    for role in ("base", "merged", "adapter", "data"):
        directory = whole / ("base" if role == "merged" else role)
        store.publish(Draft(WHOLE[role], role, directory, {}, provenance(), ()), Progress(quiet=True))
    return store


@pytest.fixture(scope="session")
def gguf(ward: Any, shop: Any, whole: Path, tmp_path_factory: Any) -> Path:
    """A GGUF as convert makes it from the whole base, which proves that nothing else stops it."""
    place = tmp_path_factory.mktemp("convert")
    recipe = place / "m.yaml"
    recipe.write_text("license: MIT\n")
    for name in ("home", "tmp"):
        (place / name).mkdir()
    words = ["convert", "--store", str(shop.url), "--run", "whole", "--model", str(recipe)]
    ended = ward([*words, "--set", "outtype=f32"], place)
    assert ended.code == 0, ended
    shop.pull(shop.resolve("whole/gguf-f32"), whole / "gguf", Progress(quiet=True))
    return whole / "gguf"


@pytest.fixture
def hostile(tmp_path: Path, shop: Any, whole: Path, gguf: Path, ward: Any) -> Callable[..., str]:
    """Run a stage on one hostile input beside whole ones; return the line with which it refuses.

    ``damage`` changes a copy of the whole input in place. Beside the line are proved: exit status 65,
    the bounds on time and memory, that no output is visible, and that nothing was written elsewhere.
    """

    def run(stage: str, role: str, damage: Callable[[Path], None], *settings: str) -> str:
        victim = f"v{uuid.uuid4().hex[:8]}"
        directory = tmp_path / "input"
        shutil.copytree(whole / {"merged": "base"}.get(role, role), directory)
        (tmp_path / "outside.txt").write_text("not theirs")
        damage(directory)
        here = tmp_path / "here"
        for name in ("home", "tmp"):
            (here / name).mkdir(parents=True)
        recipe = tmp_path / f"{victim}.yaml"
        recipe.write_text("license: MIT\n")
        command = [stage, "--store", str(shop.url), "--run", victim, "--model", str(recipe)]
        command += [word for setting in settings for word in ("--set", setting)]
        command += inputs(stage, role, victim, directory)
        before, names = tree(tmp_path), set(shop.names())
        ended = ward(command, here)
        check(ended)
        assert set(shop.names()) == names
        assert tree(tmp_path) - {"here/stdout", "here/stderr"} == before
        assert (tmp_path / "outside.txt").read_text() == "not theirs"
        return ended.errors

    def inputs(stage: str, role: str, victim: str, directory: Path) -> list[str]:
        if stage == "fetch":
            return ["--set", f"model_name_or_path={directory}"]
        name = f"base/{victim}" if role == "base" else f"{victim}/{role}"
        shop.publish(Draft(name, role, directory, {}, provenance(), ()), Progress(quiet=True))
        given = {one: WHOLE[one] for one in ROLES[stage]} | {role: name}
        words = [word for one, reference in given.items() for word in ("--input", f"{one}={reference}")]
        if stage == "prepare":
            words += ["--set", f"dataset_name={whole / 'rows.csv'}", "--set", "max_length=4000"]
        return words

    return run


def check(ended: Ended) -> None:
    """Hold a refusal to its promises."""
    assert ended.code == 65, ended
    assert re.fullmatch(r"tunemill: [^\n]{10,900}\n", ended.errors), ended.errors
    assert "bug" not in ended.errors[:20]
    assert ended.seconds <= SECONDS, ended
    assert ended.peak <= MEMORY, ended


def tree(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
