"""What the command line does inside a container image of the project."""

from __future__ import annotations

import pytest

from tunemill import image
from tunemill.errors import ConfigurationError, UsageError
from tunemill.image import IMAGES, arguments_in_image
from tunemill.stages import LISTED


def test_every_stage_has_an_image() -> None:
    assert set(IMAGES) == set(LISTED)


@pytest.mark.parametrize("arguments", [["train"], ["pipeline"], ["--help"], []])
def test_outside_of_images_nothing_changes(arguments: list[str]) -> None:
    assert arguments_in_image(arguments, {}) == arguments


@pytest.mark.parametrize(
    ("name", "given", "run"),
    [
        pytest.param("merge", [], ["merge"], id="nothing"),
        pytest.param("merge", ["--help"], ["merge", "--help"], id="help-of-the-stage"),
        pytest.param("merge", ["--model", "tiny"], ["merge", "--model", "tiny"], id="options-alone"),
        pytest.param("merge", ["merge", "--model", "tiny"], ["merge", "--model", "tiny"], id="named"),
        pytest.param("merge", ["--version"], ["--version"], id="version-of-the-whole"),
        pytest.param("infer", ["evaluate"], ["evaluate"], id="second-stage-of-an-image"),
        pytest.param("merge", ["store", "ls"], ["store", "ls"], id="store-commands-work-everywhere"),
        pytest.param("store", ["--help"], ["--help"], id="no-stage-of-its-own"),
    ],
)
def test_the_stage_s_name_may_be_left_out(name: str, given: list[str], run: list[str]) -> None:
    assert arguments_in_image(given, {"TUNEMILL_IMAGE_NAME": name}) == run


@pytest.mark.parametrize(
    ("reference", "right"),
    [
        pytest.param("", "tunemill/train", id="unknown-registry"),
        pytest.param("tunemill/merge@sha256:0", "tunemill/train", id="local"),
        pytest.param("ghcr.io/lab/merge@sha256:0", "ghcr.io/lab/train", id="registry"),
    ],
)
def test_a_foreign_stage_is_refused_with_its_image(reference: str, right: str) -> None:
    environment = {"TUNEMILL_IMAGE_NAME": "merge", "TUNEMILL_IMAGE": reference}
    with pytest.raises(UsageError, match=f"^this is the image of merge; 'train' needs the image {right}$"):
        arguments_in_image(["train"], environment)


@pytest.mark.parametrize("command", ["pipeline", "sweep"])
def test_no_image_holds_every_stage(command: str) -> None:
    with pytest.raises(UsageError, match=f"'{command}' runs every stage.*make pipeline WHERE=compose"):
        arguments_in_image([command], {"TUNEMILL_IMAGE_NAME": "infer"})


def test_models_are_compared_where_they_are_judged() -> None:
    assert arguments_in_image(["compare", "a", "b"], {"TUNEMILL_IMAGE_NAME": "infer"}) == [
        "compare",
        "a",
        "b",
    ]
    with pytest.raises(UsageError, match=r"'compare' needs the image tunemill/infer"):
        arguments_in_image(["compare", "a", "b"], {"TUNEMILL_IMAGE_NAME": "store"})


def test_no_image_holds_the_server() -> None:
    with pytest.raises(UsageError, match="images/native"):
        arguments_in_image(["serve", "lab/gguf"], {"TUNEMILL_IMAGE_NAME": "infer"})


def test_an_image_for_cuda_needs_a_gpu_to_work_but_not_to_be_asked() -> None:
    if image.this_host().gpus:
        pytest.skip("this machine has a GPU")
    environment = {"TUNEMILL_IMAGE_NAME": "infer", "TUNEMILL_BACKEND": "cuda"}
    with pytest.raises(ConfigurationError, match="--gpus all"):
        arguments_in_image(["infer", "--model", "tiny"], environment)
    assert arguments_in_image(["infer", "--help"], environment) == ["infer", "--help"]
    assert arguments_in_image(["store", "ls"], environment) == ["store", "ls"]
