"""GGUF files that are not what they should be, and texts as tokens."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunemill.errors import BadDataError
from tunemill.infer.model import Model
from tunemill.infer.predict import predict
from tunemill.infer.probe import check_loads

Make = Callable[..., Any]


def test_special_tokens_in_a_text_are_recognised_and_none_added(micro: Any) -> None:
    with Model(micro.gguf) as model:
        assert model.tokens("<s>a</s>")[0] == 1
        assert model.tokens("<s>a</s>")[-1] == 2
        assert model.tokens("a")[0] != 1
        assert model.tokens("") == ()
        assert model.ends_turn(2)
        assert not model.ends_turn(1)


@pytest.mark.parametrize("text", ["net data", "snö ☃ 雪", "tab\tand\nline", "x" * 500])
def test_tokens_spell_their_text(micro: Any, text: str) -> None:
    with Model(micro.gguf) as model:
        assert model.text(model.tokens(text)) == text


def cut(source: bytes) -> bytes:
    return source[: len(source) // 2]


def nothing(_source: bytes) -> bytes:
    return b""


def wrong_magic(source: bytes) -> bytes:
    return b"GGML" + source[4:]


def future_version(source: bytes) -> bytes:
    return source[:4] + (99).to_bytes(4, "little") + source[8:]


def endless_keys(source: bytes) -> bytes:
    return source[:16] + (1 << 60).to_bytes(8, "little") + source[24:]


def no_tensors(source: bytes) -> bytes:
    return source[:8] + bytes(8) + source[16:]


def other_kind(source: bytes) -> bytes:
    return source.replace(
        b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00lxama", 1
    )


@pytest.mark.parametrize(
    "damage", [cut, nothing, wrong_magic, future_version, endless_keys, no_tensors, other_kind]
)
def test_a_damaged_gguf_is_one_clear_error(
    micro: Any, dataset: Make, make_work: Make, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    directory = tmp_path / "gguf"
    shutil.copytree(micro.gguf.parent, directory)
    (directory / micro.gguf.name).write_bytes(damage(micro.gguf.read_bytes()))
    work = make_work(directory, dataset([("text", "data")]))
    with pytest.raises(BadDataError, match=r"model-F16.gguf") as caught:
        predict(work)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65
    assert list(work.output.iterdir()) == []


def test_random_damage_never_ends_the_process(micro: Any, tmp_path: Path) -> None:
    source = micro.gguf.read_bytes()
    chance = random.Random(5)
    messages = []
    for attempt in range(8):
        broken = bytearray(source)
        for _ in range(6):
            broken[chance.randrange(24, 6000)] = chance.randrange(256)
        path = tmp_path / f"{attempt}.gguf"
        path.write_bytes(broken)
        try:
            check_loads(path)
        except BadDataError as error:
            messages.append(str(error))
    assert len(messages) >= 4  # a changed piece of the vocabulary can go unnoticed
    assert not [message for message in messages if "\n" in message or not message]


@pytest.mark.parametrize("names", [(), ("model-F16.gguf", "model-Q8_0.gguf")])
def test_the_artifact_holds_one_model(
    micro: Any, dataset: Make, make_work: Make, tmp_path: Path, names: tuple[str, ...]
) -> None:
    directory = tmp_path / "gguf"
    directory.mkdir()
    shutil.copy(micro.gguf.parent / "prompting.json", directory)
    for name in names:
        shutil.copy(micro.gguf, directory / name)
    with pytest.raises(BadDataError, match=r"expected one GGUF model, found"):
        predict(make_work(directory, dataset([("text", "data")])))
