"""Fetch from a directory and from a Hub on a real socket, and every way it can go wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunemill.data import fetch as stage
from tunemill.data.config import FetchConfig
from tunemill.errors import (
    BadDataError,
    DeniedError,
    IntegrityError,
    TransientError,
    TunemillError,
    UsageError,
)
from tunemill.work import Work

Works = Callable[..., Work[Any]]


@pytest.fixture(autouse=True)
def repository(hub: Any, model: Path) -> None:
    hub.repositories["someone/model"] = model


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy of the small base that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def from_hub(revision: str = "main", name: str = "someone/model") -> FetchConfig:
    return FetchConfig(model_name_or_path=name, model_revision=revision)


def fetched(work: Works, model: Path, **config: Any) -> tuple[Path, dict[str, Any]]:
    one = work(FetchConfig(model_name_or_path=str(model), **config))
    return one.output, stage.fetch(one)


def one_line(error: pytest.ExceptionInfo[TunemillError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


class TestDirectory:
    def test_only_weights_configuration_and_tokenizer_are_taken(self, work: Works, model: Path) -> None:
        for name in ("pytorch_model.bin", "notes.txt", "convert.py", "consolidated.safetensors"):
            (model / name).write_bytes(b"not taken")
        output, facts = fetched(work, model, license="MIT")
        names = {path.name for path in output.iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
        assert not names & {"pytorch_model.bin", "notes.txt", "convert.py", "consolidated.safetensors"}
        assert (output / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
        assert facts["source"] == "directory"
        assert facts["parameters"] == 4
        assert facts["dtype"] == "F32"
        assert facts["license"] == "MIT"

    def test_a_chat_template_of_the_recipe_replaces_the_models(self, work: Works, model: Path) -> None:
        output, _ = fetched(work, model, chat_template="{{ messages[0]['content'] }}")
        assert (output / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"

    def test_a_broken_chat_template_is_refused(self, work: Works, model: Path) -> None:
        with pytest.raises(BadDataError) as error:
            fetched(work, model, chat_template="{{ raise_exception('no') }}")
        one_line(error, "chat template")

    def test_an_edited_file_changes_what_is_read(self, model: Path) -> None:
        config = FetchConfig(model_name_or_path=str(model))
        before = stage.reads(config)
        (model / "config.json").write_text('{"model_type": "mistral"}')
        assert stage.reads(config) != before

    def test_pickled_weights_are_refused(self, work: Works, model: Path) -> None:
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        with pytest.raises(BadDataError) as error:
            fetched(work, model)
        one_line(error, "not safetensors", "pytorch_model.bin")

    def test_no_weights_at_all(self, work: Works, model: Path) -> None:
        (model / "model.safetensors").unlink()
        with pytest.raises(BadDataError) as error:
            fetched(work, model)
        one_line(error, "no weights")

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    def test_remote_code_is_refused(self, work: Works, model: Path, name: str) -> None:
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.X"}}))
        with pytest.raises(BadDataError) as error:
            fetched(work, model)
        one_line(error, "auto_map", name)

    def test_modelling_code_is_refused(self, work: Works, model: Path) -> None:
        (model / "modeling_new.py").write_text("raise SystemExit")
        with pytest.raises(BadDataError) as error:
            fetched(work, model)
        one_line(error, "modeling_new.py")

    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(lambda data: data[:-1], id="truncated in the tensors"),
            pytest.param(lambda data: data[:20], id="truncated in the header"),
            pytest.param(lambda data: b"", id="empty"),
            pytest.param(lambda data: data + b"\0", id="longer than its tensors"),
            pytest.param(lambda data: struct.pack("<Q", 1 << 62) + data[8:], id="header of 4 EiB"),
            pytest.param(lambda data: data.replace(b'"F32"', b'"X32"'), id="unknown type"),
            pytest.param(lambda data: data.replace(b"[2, 2]", b"[2, 3]"), id="shape against size"),
            pytest.param(lambda data: data.replace(b"[0, 16]", b"[4, 16]"), id="hole"),
        ],
    )
    def test_damaged_weights_are_refused(
        self, work: Works, model: Path, damage: Callable[[bytes], bytes]
    ) -> None:
        weights = model / "model.safetensors"
        weights.write_bytes(damage(weights.read_bytes()))
        with pytest.raises(BadDataError) as error:
            fetched(work, model)
        one_line(error, "model.safetensors")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            pytest.param("config.json", None, id="no configuration"),
            pytest.param("config.json", "{", id="configuration cut"),
            pytest.param("config.json", "[]", id="configuration no object"),
            pytest.param("tokenizer.json", None, id="no tokenizer"),
            pytest.param("chat_template.jinja", None, id="no chat template"),
        ],
    )
    def test_incomplete_models_are_refused(
        self, work: Works, model: Path, name: str, content: str | None
    ) -> None:
        (model / name).unlink()
        if content is not None:
            (model / name).write_text(content)
        with pytest.raises(BadDataError) as error:
            fetched(work, model)
        one_line(error)

    def test_a_full_disk(self, work: Works, model: Path, full_disk: Path) -> None:
        (model / "vocab.json").write_bytes(bytes(1 << 16))
        one = work(FetchConfig(model_name_or_path=str(model)))
        with pytest.raises(TransientError) as error:
            stage.fetch(replace(one, output=full_disk))
        one_line(error, "free some space")
        assert not list(full_disk.iterdir())


class TestCheck:
    def test_a_missing_directory(self) -> None:
        with pytest.raises(UsageError) as error:
            stage.check(FetchConfig(model_name_or_path="./nowhere"))
        one_line(error, "./nowhere")

    def test_the_hub_needs_a_revision(self) -> None:
        with pytest.raises(UsageError) as error:
            stage.check(FetchConfig(model_name_or_path="someone/model"))
        one_line(error, "model_revision")

    def test_heads_must_divide_the_width(self) -> None:
        with pytest.raises(UsageError) as error:
            stage.check(FetchConfig(model_name_or_path="made", hidden_size=250))
        one_line(error, "hidden_size 250")


class TestHub:
    def test_a_branch_is_resolved_to_its_commit(self, hub: Any, work: Works, model: Path) -> None:
        (model / "pytorch_model.bin").write_bytes(b"never fetched")
        config = from_hub("main")
        assert stage.reads(config) == {"commit": hub.commit}
        one = work(config)
        facts = stage.fetch(one)
        assert facts["commit"] == hub.commit
        names = {path.name for path in one.output.iterdir()}
        assert names == {path.name for path in model.iterdir()} - {"pytorch_model.bin"}
        assert not any("pytorch_model" in path for path in hub.paths)

    def test_a_pinned_commit_asks_the_hub_nothing(self, hub: Any) -> None:
        assert stage.reads(from_hub(hub.commit)) == {"commit": hub.commit}
        assert hub.paths == []

    def test_the_token_opens_a_gated_repository_and_is_not_recorded(
        self, hub: Any, work: Works, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        hub.gated["someone/model"] = "hf_secretsecret"
        monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
        one = work(from_hub())
        facts = stage.fetch(one)
        assert "Bearer hf_secretsecret" in hub.authorizations
        written = b"".join(path.read_bytes() for path in one.output.rglob("*") if path.is_file())
        assert "hf_secret" not in str(facts) + str(capfd.readouterr())
        assert b"hf_secret" not in written

    def test_gated(self, hub: Any, work: Works) -> None:
        hub.gated["someone/model"] = "hf_other"
        with pytest.raises(DeniedError) as error:
            stage.fetch(work(from_hub()))
        one_line(error, "gated", "HF_TOKEN")
        assert error.value.exit_code == 77

    def test_missing_repository(self, hub: Any, work: Works) -> None:
        with pytest.raises(UsageError) as error:
            stage.fetch(work(from_hub(name="someone/else")))
        one_line(error, "no repository someone/else")
        assert error.value.exit_code == 2

    @pytest.mark.parametrize("revision", ["v9", "f" * 40])
    def test_missing_revision(self, hub: Any, work: Works, revision: str) -> None:
        with pytest.raises(UsageError) as error:
            stage.fetch(work(from_hub(revision)))
        one_line(error, f"no revision {revision}")

    def test_no_hub_id(self, hub: Any, work: Works) -> None:
        with pytest.raises(UsageError) as error:
            stage.fetch(work(from_hub(name="a/b/c")))
        one_line(error, "a/b/c")

    def test_pickles_are_refused_before_a_byte_is_fetched(self, hub: Any, work: Works, model: Path) -> None:
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        with pytest.raises(BadDataError) as error:
            stage.fetch(work(from_hub()))
        one_line(error, "not safetensors")
        assert not any("/resolve/" in path for path in hub.paths)

    def test_a_damaged_download_is_removed(self, hub: Any, work: Works, model: Path) -> None:
        hub.damaged.add("tokenizer.json")
        one = work(from_hub())
        with pytest.raises(IntegrityError) as error:
            stage.fetch(one)
        one_line(error, "tokenizer.json", "damaged")
        assert not list(one.scratch.rglob("tokenizer.json"))
        assert not list(one.output.iterdir())

    def test_a_cut_off_fetch_goes_on(self, hub: Any, work: Works, model: Path) -> None:
        hub.damaged.add("tokenizer.json")
        with pytest.raises(IntegrityError):
            stage.fetch(work(from_hub()))
        hub.damaged.clear()
        hub.paths.clear()
        one = work(from_hub(), "again")
        stage.fetch(one)
        assert (one.output / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()

    def test_nobody_listens(self, work: Works, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(TransientError) as error:
            stage.fetch(work(from_hub()))
        one_line(error, "network")
        assert error.value.exit_code == 75

    @pytest.mark.parametrize(
        ("status", "expected"),
        [(401, DeniedError), (403, DeniedError), (404, UsageError), (500, TransientError)],
    )
    def test_refusals_without_a_reason(
        self, hub: Any, work: Works, status: int, expected: type[TunemillError]
    ) -> None:
        hub.failing = status
        with pytest.raises(expected) as error:
            stage.fetch(work(from_hub()))
        one_line(error, "someone/model")
