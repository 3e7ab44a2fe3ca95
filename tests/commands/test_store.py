"""``tunemill store``: results on stdout, one line on stderr and the right exit code when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from tunemill.cli import run
from tunemill.commands.store import store as group

WEIGHTS = b"weights" * 100


@pytest.fixture
def tunemill(tmp_path, monkeypatch, capsys, caplog):
    """Run ``tunemill store …`` on a store of its own; returns exit code, stdout and the error line."""
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("TUNEMILL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str):
        caplog.clear()
        code = run(["store", *arguments])
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        return code, capsys.readouterr().out, "\n".join(errors)

    return call


@pytest.fixture
def filled(tunemill, tmp_path):
    """A base and an adapter made from it; returns their references."""
    references = []
    for kind, name, files, more in (
        ("base", "base/tiny", {"model.safetensors": WEIGHTS, "config.json": b"{}"}, ["--tag", "v1"]),
        ("adapter", "run/adapter", {"adapter_model.safetensors": b"small"}, ["--input", "base=base/tiny"]),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        for path, data in files.items():
            (folder / path).write_bytes(data)
        code, out, _ = tunemill("push", str(folder), name, "--kind", kind, *more)
        assert code == 0
        references.append(out.strip())
    return references


def test_push_prints_the_reference_and_pull_gives_the_same_files(tunemill, filled, tmp_path):
    assert filled[0].startswith("base/tiny@sha256:")
    code, out, _ = tunemill("pull", filled[0], "pulled")
    assert (code, out) == (0, "pulled\n")
    assert (tmp_path / "pulled/model.safetensors").read_bytes() == WEIGHTS


def test_ls_lists_names_and_the_history_of_one(tunemill, filled, tmp_path):
    assert [line.split()[:2] for line in tunemill("ls")[1].splitlines()] == [
        ["base/tiny", "base"],
        ["run/adapter", "adapter"],
    ]
    (tmp_path / "base/config.json").write_bytes(b"{ }")
    second = tunemill("push", "base", "base/tiny", "--kind", "base")[1].strip()
    rows = json.loads(tunemill("ls", "base/tiny", "--json")[1])
    assert [f"base/tiny@{row['digest']}" for row in rows] == [second, filled[0]]
    assert [row["tags"] for row in rows] == [[], ["v1"]]
    assert len(tunemill("ls", "base/tiny")[1].splitlines()) == 2


def test_show_tells_files_and_provenance(tunemill, filled):
    out = tunemill("show", "run/adapter")[1]
    assert filled[1] in out
    assert filled[0] in out
    assert "adapter_model.safetensors" in out
    shown = json.loads(tunemill("show", "run/adapter", "--json")[1])
    assert shown["reference"] == filled[1]
    assert shown["provenance"]["stage"] == "push"
    assert shown["provenance"]["inputs"] == {"base": filled[0]}
    assert shown["provenance"]["host"]["cores"] > 0
    assert "/" not in shown["provenance"]["config"]["directory"], "paths of this machine are private"


def test_log_walks_down(tunemill, filled):
    lines = tunemill("log", "run/adapter")[1].splitlines()
    assert lines[1].startswith("└─ base: base/tiny@sha256:")
    assert json.loads(tunemill("log", "run/adapter", "--json")[1])["inputs"][0]["reference"] == filled[0]


def test_diff_tells_what_differs(tunemill, filled):
    assert "kind kind: base -> adapter" in tunemill("diff", "base/tiny", "run/adapter")[1]
    assert tunemill("diff", "base/tiny", "base/tiny:v1")[1] == "no difference\n"
    found = json.loads(tunemill("diff", "base/tiny", "run/adapter", "--json")[1])["differences"]
    assert {"where", "aspect", "key", "first", "second"} == set(found[0])


def test_tag_is_for_ever(tunemill, filled, tmp_path):
    assert tunemill("tag", "base/tiny", "best")[:2] == (0, "base/tiny:best\n")
    assert tunemill("tag", "base/tiny:best", "best")[0] == 0
    (tmp_path / "base/config.json").write_bytes(b"{ }")
    tunemill("push", "base", "base/tiny", "--kind", "base")
    code, out, error = tunemill("tag", "base/tiny", "best")
    assert (code, out) == (75, "")
    assert "a tag never changes" in error


def test_verify_reports_and_fails(tunemill, filled, tmp_path):
    code, out, _ = tunemill("verify")
    assert code == 0
    assert out.endswith("0 broken\n")
    (damaged,) = [
        path for path in (tmp_path / "store/blobs/sha256").iterdir() if path.read_bytes() == WEIGHTS
    ]
    damaged.chmod(0o644)
    damaged.write_bytes(WEIGHTS.upper())
    code, out, error = tunemill("verify", "run/adapter")
    assert code == 65
    assert f"{filled[0]}: model.safetensors has sha256" in out
    assert f"{filled[0]}: model.safetensors" in error
    assert "\n" not in error
    assert len(json.loads(tunemill("verify", "--json")[1])["broken"]) == 1


def test_gc_only_tells_until_asked_to_delete(tunemill, filled, tmp_path):
    for path in (tmp_path / "store/branches/run").rglob("*"):
        if path.is_file():
            path.unlink()
    told = json.loads(tunemill("gc", "--grace", "0", "--json")[1])
    assert told["deleted"] is False
    assert any(key.startswith("manifests/") for key in told["objects"])
    assert tunemill("gc", "--grace", "0")[1].startswith("would delete 4 objects of ")
    assert tunemill("show", filled[1])[0] == 0
    assert tunemill("gc")[1].startswith("would delete 0 objects"), "a week of grace by default"
    done = json.loads(tunemill("gc", "--grace", "0", "--delete", "--json")[1])
    assert done["objects"] == told["objects"]
    assert tunemill("show", filled[1])[0] == 2
    assert tunemill("verify", "base/tiny")[0] == 0


def test_doctor_finds_a_directory_fit(tunemill):
    findings = json.loads(tunemill("doctor", "--json")[1])
    assert {finding["state"] for finding in findings} == {"ok"}
    code, out, _ = tunemill("doctor")
    assert code == 0
    assert len(out.splitlines()) == len(findings)


def test_export_writes_a_layout(tunemill, filled, tmp_path):
    assert tunemill("export", "base/tiny:v1", "layout")[:2] == (0, "layout\n")
    (manifest,) = json.loads((tmp_path / "layout/index.json").read_text())["manifests"]
    assert manifest["annotations"]["org.opencontainers.image.ref.name"] == "v1"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(("show", "base/tiney"), 2, "did you mean base/tiny?", id="near name"),
        pytest.param(("show", "base/tiny:v2"), 2, "did you mean base/tiny:v1?", id="near tag"),
        pytest.param(("show", "Base"), 2, "no artifact name", id="malformed reference"),
        pytest.param(("pull", "base/tiny", "base"), 2, "exists already", id="destination exists"),
        pytest.param(("export", "base/tiny", "base"), 2, "exists already", id="layout exists"),
        pytest.param(("push", "nowhere", "a/b", "--kind", "base"), 2, "no directory nowhere", id="no folder"),
        pytest.param(("push", "base", "a/b", "--kind", "bass"), 2, "no kind of artifact", id="unknown kind"),
        pytest.param(("push", "base", "a/b"), 2, "--kind", id="no kind"),
        pytest.param(
            ("push", "base", "a/b", "--kind", "base", "--input", "x"),
            2,
            "ROLE=REFERENCE",
            id="malformed input",
        ),
        pytest.param(
            ("push", "base", "a/b", "--kind", "base", "--input", "x=no/such"), 2, "no/such", id="absent input"
        ),
        pytest.param(("push", "empty", "a/b", "--kind", "base"), 65, "no files", id="nothing to push"),
        pytest.param(("push", "pickle", "a/b", "--kind", "base"), 65, "weights.bin", id="a pickle"),
        pytest.param(("gc", "--grace", "7"), 2, "--grace 7", id="age without unit"),
        pytest.param(("ls", "--store", "nowhere"), 78, "no store at", id="no store"),
        pytest.param(("ls", "--store", "ftp://x/y"), 2, "ftp://x/y", id="unknown scheme"),
        pytest.param(("ls", "--store", "base"), 78, "is no store", id="another folder"),
    ],
)
def test_bad_requests_fail_in_one_line(tunemill, filled, tmp_path, arguments, code, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/weights.bin").write_bytes(b"pickled")
    before = snapshot(tmp_path)
    got, out, error = tunemill(*arguments)
    assert (got, out) == (code, "")
    assert message in error
    assert "\n" not in error
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> set[Path]:
    """Everything there but the cache and what leases a failed push may leave."""
    return {path for path in folder.rglob("*") if "cache" not in path.parts and "leases" not in path.parts}


@pytest.mark.parametrize("name", sorted(group.commands))
def test_help_ends_in_two_examples_that_parse(name):
    command = group.commands[name]
    lines = (command.epilog or "").replace("\b\n", "").splitlines()
    assert lines[0] == "Examples:"
    assert len(lines) == 3
    for line in lines[1:]:
        program, sub, called, *arguments = line.split()
        assert (program, sub, called) == ("tunemill", "store", name)
        command.make_context(name, arguments, resilient_parsing=False).close()
    assert isinstance(command, click.Command)
