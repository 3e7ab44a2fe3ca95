"""Proves that the llama.cpp installed here computes, and on what it does.

    python -m tunemill.gguf.selfcheck [cpu|cuda|metal|…]

A tiny model that counts (after each byte comes the next) is written, quantized and run: the right
answer needs every kind of matrix product, and no network, torch or model file. Where llama.cpp was
built for a GPU and fell back to the CPU without a word, its own log tells, and this fails. llama.cpp
is only loaded in child processes, as everywhere in this package.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tunemill.errors import ConfigurationError, TunemillError
from tunemill.files import write_json
from tunemill.gguf.child import Limits, fail, machine_memory, read_result, run
from tunemill.gguf.library import Library
from tunemill.gguf.types import file_type
from tunemill.gguf.writer import Metadata, write_gguf
from tunemill.host import BACKENDS, this_host

MODULE = "tunemill.gguf.selfcheck"  # also when it runs as a program
QUANT = "Q4_K_M"
WIDTH, LAYERS, HEADS, FEED_FORWARD, CONTEXT = 256, 2, 4, 512, 64  # K-quants need multiples of 256
SPECIAL = 3  # <unk>, <s>, </s>; the 256 bytes follow
FIRST, STEPS = "a", 8
SECONDS = 300.0  # the first use of a GPU may compile its kernels
DEVICES = {"cuda": "CUDA", "hip": "ROCm", "metal": "MTL|Metal", "sycl": "SYCL", "vulkan": "Vulkan"}
"""How llama.cpp's log calls a backend's devices, as a pattern of the beginning."""
USED = re.compile(r"using device (\S+) \((.*?)\)")
OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
DEBUG = 1  # GGML_LOG_LEVEL_DEBUG; its many lines would push the others out of the log's kept end
UNKNOWN = "unknown model architecture"

log = logging.getLogger("tunemill")


def knows(architecture: str, scratch: Path) -> bool:
    """Say whether the llama.cpp installed here has this architecture, by its ``general.architecture``."""
    path = scratch / "architecture.gguf"
    write_gguf(path, {"general.architecture": architecture}, {})
    ended = run([MODULE, "load", str(path)], scratch / "llama", _limits(), threading.Event())
    return UNKNOWN not in ended.log


def check(backend: str, scratch: Path) -> str:
    """Make, quantize and run the counting model; return one line on what did it.

    Raises:
        ConfigurationError: llama.cpp is built for something else, or does not compute on ``backend``.
        BadDataError: llama.cpp failed; the message ends with its reason.
    """
    built = this_host().backend
    if backend != built:
        raise ConfigurationError(
            f"llama.cpp here computes on {built}, not on {backend}: install it for {backend} again, and "
            "see that the GPU's driver works"
        )
    plain, small = scratch / "model-F16.gguf", scratch / f"model-{QUANT}.gguf"
    write_counting_model(plain)
    library = Library(scratch, threading.Event())
    settings = {"ftype": file_type(QUANT), "nthread": 1, "pure": False}
    llama = library.quantize(plain, small, settings, lambda: None).llama
    text, said = _count(small, scratch)
    expected = "".join(chr(ord(FIRST) + step) for step in range(1, STEPS + 1))
    if text != expected:
        raise ConfigurationError(
            f"llama.cpp computes wrongly on {backend}: it counted {text!r}, not {expected!r}"
        )
    device = _device(backend, said)
    return (
        f"{backend}: llama-cpp-python {llama['version']} quantized to {QUANT} and counted right on {device}"
    )


def write_counting_model(path: Path) -> None:
    """Write a Llama whose likeliest next token is the one after its last token."""
    random = np.random.default_rng(1)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    meanings = random.normal(0, 1, (len(tokens), WIDTH))  # nearly orthogonal, so each is found again
    small = {"attn_output": 1e-3, "ffn_down": 1e-3}  # the layers take part without deciding
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
    shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (FEED_FORWARD, WIDTH))
    shapes["ffn_down"] = (WIDTH, FEED_FORWARD)
    tensors = {"token_embd.weight": meanings, "output.weight": np.roll(meanings, 1, axis=0)}
    tensors["output_norm.weight"] = np.ones(WIDTH)
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.weight"] = random.normal(0, small.get(name, 0.05), shape)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = np.ones(WIDTH)
    stored = {name: array.astype("f2" if array.ndim > 1 else "f4") for name, array in tensors.items()}
    write_gguf(path, _metadata(tokens), stored)


def _metadata(tokens: Sequence[str]) -> Metadata:
    return {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256,  # unknown, control, byte
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _count(model: Path, scratch: Path) -> tuple[str, str]:
    """Return what the model wrote after ``FIRST``, and what llama.cpp logged meanwhile."""
    ended = run([MODULE, "load", str(model)], scratch / "llama", _limits(), threading.Event())
    fail(ended, f"running {model.name}", _limits())
    tokens = read_result(model.with_suffix(".json"))
    return bytes(token - SPECIAL for token in tokens if token >= SPECIAL).decode("latin-1"), ended.log


def _device(backend: str, said: str) -> str:
    """Return the name of the device that computed.

    Raises:
        ConfigurationError: it is not of ``backend``.
    """
    device, layers = USED.search(said), OFFLOADED.search(said)
    if backend == "cpu":
        if layers and layers[1] != "0":
            raise ConfigurationError(
                f"llama.cpp computed on {device[1] if device else 'a GPU'}, not on the CPU"
            )
        return this_host().processor
    if (
        device is None
        or layers is None
        or layers[1] != layers[2]
        or not re.match(DEVICES[backend], device[1])
    ):
        found = f"{layers[0]} ({device[1]})" if device and layers else "no layer on a GPU"
        raise ConfigurationError(
            f"llama.cpp was built for {backend} and computed elsewhere: {found}; see that the driver works"
        )
    return device[2]


def _limits() -> Limits:
    return Limits(SECONDS, machine_memory())


def load(path: Path) -> None:
    """In the child: load a model with all it can on the GPU, and let it count if it is whole."""
    import ctypes

    from tunemill.llama import load_llama

    llama = load_llama()

    def write(level: int, text: bytes, _data: object) -> None:
        if level != DEBUG:
            os.write(2, text)

    llama.tunemill_log = llama.llama_log_callback(write)  # must outlive every call
    llama.llama_log_set(llama.tunemill_log, ctypes.c_void_p(0))
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = -1
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        sys.exit(1)  # the log says why
    settings = llama.llama_context_default_params()
    settings.n_ctx = CONTEXT
    context = llama.llama_init_from_model(model, settings)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    tokens = [SPECIAL + ord(FIRST)]
    for _ in range(STEPS):
        batch = llama.llama_batch_get_one((ctypes.c_int32 * 1)(tokens[-1]), 1)
        if llama.llama_decode(context, batch):
            sys.exit("error: llama.cpp cannot decode")
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), shape=(vocabulary,))
        tokens.append(int(logits.argmax()))
    write_json(path.with_suffix(".json"), tokens[1:])


def main(arguments: Sequence[str]) -> int:
    """Check the backend named, else the one that is installed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments[:1] == ["load"]:
        load(Path(arguments[1]))
        return 0
    backend = arguments[0] if arguments else this_host().backend
    try:
        if backend not in ("cpu", *BACKENDS):
            raise ConfigurationError(f"'{backend}' is no backend: expected one of cpu, {', '.join(BACKENDS)}")
        with tempfile.TemporaryDirectory(prefix="tunemill-") as scratch:
            line = check(backend, Path(scratch))
    except TunemillError as error:
        log.error("%s", error)
        return error.exit_code
    sys.stdout.write(f"{line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
