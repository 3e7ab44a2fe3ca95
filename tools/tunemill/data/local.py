"""What of a model directory is taken, and the checks that every base passes before it is one.

Only weights in safetensors, configuration and tokenizer are taken. A model whose configuration
asks for code of its own is refused: nothing that is fetched is ever run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.files import atomic_write, disk_errors, need_space, read_object
from tunemill.progress import Progress
from tunemill.prompting import read_prompting
from tunemill.tokenizer import prove
from tunemill.weights import read_headers

TAKEN = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Names that are taken: no pickles, no code, no second copy of the weights in another layout."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
CODE = ("modeling_*.py", "configuration_*.py", "tokenization_*.py")
CHUNK = 8 << 20


def choose(names: Iterable[str], model: str) -> list[str]:
    """Return which of a model's files to take.

    Raises:
        BadDataError: it has no safetensors weights, or brings code.
    """
    names = sorted(names)
    code = [name for name in names if _matches(name, CODE)]
    if code:
        raise BadDataError(f"{model} brings its own code ({code[0]}), which is never run: take another model")
    chosen = [name for name in names if _matches(name, TAKEN)]
    if any(name.endswith(".safetensors") for name in chosen):
        return chosen
    pickles = [name for name in names if _matches(name, PICKLES)]
    if pickles:
        raise BadDataError(
            f"{model} is not safetensors but {pickles[0]}, which may run code when it is loaded: "
            "take a revision with model.safetensors, or convert it where it may be trusted"
        )
    raise BadDataError(f"{model} has no weights: expected model.safetensors or model-*.safetensors")


def copy_model(source: Path, destination: Path, progress: Progress) -> None:
    """Copy a model's files from a local directory.

    Raises:
        BadDataError: as ``choose``, or a file is a link to somewhere else.
        TransientError: the disk is full.
    """
    files = [source / name for name in choose((p.name for p in source.iterdir() if p.is_file()), str(source))]
    for path in files:
        _refuse_link(path)
    total = sum(path.stat().st_size for path in files)
    need_space(destination, total)
    with progress.task(f"copy {source.name}", total, "B") as task:
        for path in files:
            with path.open("rb") as opened, atomic_write(destination / path.name) as target:
                while chunk := opened.read(CHUNK):
                    target.write(chunk)
                    task.advance(len(chunk))


def _refuse_link(path: Path) -> None:
    """Take links within the directory, and those of the Hub's own cache into its ``blobs``.

    Raises:
        BadDataError: it leads elsewhere: what is there is not the model's to publish.
    """
    directory, target = path.parent.resolve(), path.resolve()
    blobs = directory.parent.parent / "blobs"
    if target.parent not in (directory, blobs if directory.parent.name == "snapshots" else directory):
        raise BadDataError(f"{path} is a link to {target}, outside the model: put the file itself there")


def check_base(directory: Path) -> dict[str, Any]:
    """Check a base model's files and return what they say about it.

    Raises:
        BadDataError: weights are damaged or missing, the configuration is malformed or asks for
            code, or there is no tokenizer or usable chat template.
    """
    config = _object(directory / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if (directory / name).exists() and _object(directory / name).get("auto_map"):
            raise BadDataError(f"{name} asks for the model's own code (auto_map), which is never run")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise BadDataError("the model has no tokenizer: expected tokenizer.json or tokenizer.model")
    if (directory / "tokenizer.json").is_file():
        prove(directory / "tokenizer.json")
    headers = read_headers(directory)
    read_prompting(directory).prompt([{"role": "user", "content": "text"}])
    tensors = [tensor for header in headers for tensor in header.tensors.values()]
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.size
    return {
        "architecture": next(iter(config.get("architectures") or []), None),
        "model_type": config.get("model_type"),
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "dtype": sizes.most_common(1)[0][0] if sizes else None,
    }


def write_template(directory: Path, template: str) -> None:
    """Put a chat template in place of the model's own.

    Raises:
        TransientError: the disk is full.
    """
    with disk_errors(directory), atomic_write(directory / "chat_template.jinja") as target:
        target.write(template.encode())


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise BadDataError(f"the model has no {path.name}: it is not a Hugging Face model")
    return read_object(path)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
