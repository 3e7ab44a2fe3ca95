"""What running inside one of the project's container images means for the command line.

An image holds the packages of its own stages and no others, and says which image it is in
``TUNEMILL_IMAGE_NAME``. A stage that belongs elsewhere is refused with the name of its image, before
anything is imported or pulled; in its own image a stage's name may be left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from tunemill.errors import ConfigurationError, UsageError
from tunemill.host import this_host

IMAGES = {
    "fetch": "prepare",
    "prepare": "prepare",
    "train": "train",
    "merge": "merge",
    "convert": "convert",
    "convert-lora": "convert",
    "imatrix": "infer",
    "gptq": "gptq",
    "quantize": "quantize",
    "infer": "infer",
    "evaluate": "infer",
}
"""The image of each stage. ``store`` is the one without a stage."""

LOOKING = {"--help", "-h", "--version", "--dry-run"}


def arguments_in_image(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ
) -> Sequence[str]:
    """Return what to run in this image, which is ``arguments`` itself outside of any.

    Raises:
        UsageError: the stage is another image's.
        ConfigurationError: the image computes on a GPU and there is none.
    """
    image = environment.get("TUNEMILL_IMAGE_NAME")
    if not image:
        return arguments
    if image in IMAGES and arguments[:1] != ["--version"] and (not arguments or arguments[0].startswith("-")):
        arguments = [image, *arguments]
    command = arguments[0] if arguments else ""
    if command in ("pipeline", "sweep"):
        raise UsageError(
            f"'{command}' runs every stage, and this is the image of {image} alone: "
            "start one container for each stage, as 'make pipeline WHERE=compose' does"
        )
    if command == "serve":
        raise UsageError(
            "no image holds llama.cpp's server: install Tunemill on the host itself (images/native), "
            "or pull the GGUF and give it to a server's own image"
        )
    if command == "compare":  # judges as evaluate does
        _refuse_foreign(command, IMAGES["evaluate"], image, environment)
    if command in IMAGES:
        _refuse_foreign(command, IMAGES[command], image, environment)
        if not LOOKING & set(arguments):
            _need_accelerator(environment.get("TUNEMILL_BACKEND", "cpu"))
    return arguments


def _refuse_foreign(command: str, needed: str, image: str, environment: Mapping[str, str]) -> None:
    if needed == image:
        return
    reference = environment.get("TUNEMILL_IMAGE", "").partition("@")[0]
    registry, slash, _ = reference.rpartition("/")
    right = f"{registry}{slash}{needed}" if slash else f"tunemill/{needed}"
    raise UsageError(f"this is the image of {image}; '{command}' needs the image {right}")


def _need_accelerator(backend: str) -> None:
    if backend == "cuda" and not this_host().gpus:
        raise ConfigurationError(
            "this image computes on CUDA and sees no NVIDIA GPU: start it with one (docker run --gpus all, "
            "GPU=1 with make, a nvidia.com/gpu limit on Kubernetes), or take the image without -cuda"
        )
