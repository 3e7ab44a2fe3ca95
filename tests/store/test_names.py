"""Names, tags, references and paths: what is let through, and what is refused with one line."""

from __future__ import annotations

import pytest

from tunemill.errors import BadDataError, UsageError
from tunemill.store.names import Wanted, check_name, check_paths, check_tag, parse_reference

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "name",
    ["base/llama3", "base/llama3.2-1b", "llama3-cap/gguf-q4_k_m", "tiny-stdlib/checkpoint-0123456789abcdef"],
)
def test_names_of_the_pipeline_are_allowed(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "base", "a/b/c", "Base/llama3", "base/", "/base", "base/..", "../base", "base/a b"),
        *("base/-a", "base/a-", "base/.a", "base/a..b", "base/ä", "base/a\n", "a/" + "b" * 200),
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no artifact name") as caught:
        check_name(name)
    assert "\n" not in str(caught.value).replace(name, "")


@pytest.mark.parametrize("tag", ["v1", "action-0123456789abcdef", "_x", "1.0.2", "a" * 128])
def test_tags(tag: str) -> None:
    assert check_tag(tag) == tag


@pytest.mark.parametrize("tag", ["", "V1", ".hidden", "-x", "a/b", "..", "a" * 129, "v1\n"])
def test_other_tags_are_refused(tag: str) -> None:
    with pytest.raises(UsageError, match="is no tag"):
        check_tag(tag)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param("base/tiny", Wanted("base/tiny"), id="newest"),
        pytest.param("base/tiny:v1", Wanted("base/tiny", tag="v1"), id="tag"),
        pytest.param(f"base/tiny@sha256:{HEX}", Wanted("base/tiny", digest=f"sha256:{HEX}"), id="digest"),
    ],
)
def test_references(text: str, wanted: Wanted) -> None:
    assert parse_reference(text) == wanted


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("base/tiny:", "is no tag", id="empty tag"),
        pytest.param("base/tiny@", "64 hex digits, got ''", id="empty digest"),
        pytest.param("base/tiny@sha256:abc", "64 hex digits, got 'sha256:abc'", id="short digest"),
        pytest.param(f"base/tiny@sha512:{HEX}", "64 hex digits", id="other algorithm"),
        pytest.param(f"base/tiny@sha256:{HEX.upper()}", "64 hex digits", id="upper case"),
        pytest.param("tiny", "is no artifact name", id="no project"),
        pytest.param("base/tiny:v1:v2", "is no tag", id="two tags"),
    ],
)
def test_malformed_references_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_reference(text)


def test_paths_of_real_artifacts_are_allowed() -> None:
    check_paths(["config.json", "model-00001-of-00002.safetensors", "a/b/c/d/e/f/g/h", "README.md", "a+b/_x"])


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        pytest.param(["../x"], "neither '.' nor '..'", id="climbs"),
        pytest.param(["a/../../x"], "neither '.' nor '..'", id="climbs later"),
        pytest.param(["a/./x"], "neither '.' nor '..'", id="dot"),
        pytest.param(["/etc/passwd"], "is refused", id="absolute"),
        pytest.param(["a//b"], "is refused", id="empty segment"),
        pytest.param([""], "is refused", id="empty"),
        pytest.param(["a\\b"], "is refused", id="backslash"),
        pytest.param(["c:x"], "is refused", id="drive"),
        pytest.param(["a\x00b"], "is refused", id="nul"),
        pytest.param(["über"], "is refused", id="not ASCII"),
        pytest.param(["a/b/c/d/e/f/g/h/i"], "more than 8 segments", id="deep"),
        pytest.param(["x" * 256], "is refused", id="long"),
        pytest.param(["Model.json", "model.JSON"], "differ in nothing but case", id="same in other case"),
        pytest.param(["a", "a/b"], "below another file", id="file as folder"),
        pytest.param(["a/b", "A"], "below another file", id="file as folder in other case"),
        pytest.param(["pytorch_model.bin"], "pickles and archives", id="bin"),
        pytest.param(["optimizer.PT"], "pickles and archives", id="pt"),
        pytest.param(["x.pkl"], "pickles and archives", id="pkl"),
        pytest.param(["x.tar.gz"], "pickles and archives", id="archive"),
    ],
)
def test_paths_that_could_harm_are_refused(paths: list[str], reason: str) -> None:
    with pytest.raises(BadDataError, match=reason):
        check_paths(paths)
