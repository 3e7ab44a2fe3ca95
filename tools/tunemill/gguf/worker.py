"""What runs inside the child processes that touch llama.cpp: ``python -m tunemill.gguf.worker``.

A request is a JSON file; the answer is written beside it. llama.cpp may end this process at any
moment: the parent sees that, and its log says why.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunemill.files import write_json
from tunemill.gguf.quantizer import quantize
from tunemill.llama import build_of, load_llama


def main(request_file: str) -> None:
    """Answer one request."""
    request = json.loads(Path(request_file).read_text("utf-8"))
    tasks: Mapping[str, Callable[..., Any]] = {
        "quantize": quantize,
        "tokenize": tokenize,
        "load": load,
        "chat": chat,
        "measure": measure,
        "imatrix": imatrix,
        "differences": differences,
        "speed": speed,
    }
    llama_cpp = _library()
    answer = tasks[request.pop("task")](llama_cpp, **request)
    answered = {"llama": build_of(llama_cpp), "answer": answer}
    write_json(Path(request_file).with_suffix(".answer.json"), answered)


def _library() -> Any:
    import llama_cpp

    def write(_level: int, text: bytes, _data: object) -> None:
        os.write(2, text)

    llama_cpp.tunemill_log = llama_cpp.llama_log_callback(write)  # must outlive every call
    llama_cpp.llama_log_set(llama_cpp.tunemill_log, ctypes.c_void_p(0))
    return load_llama()


def tokenize(llama_cpp: Any, model: str, texts: list[str]) -> dict[str, Any]:
    """Tokenize texts as inference does: nothing added, special tokens recognised."""
    vocabulary = llama_cpp.llama_model_get_vocab(_model(llama_cpp, model, vocab_only=True))
    return {
        "ids": [_ids(llama_cpp, vocabulary, text) for text in texts],
        "size": llama_cpp.llama_vocab_n_tokens(vocabulary),
        "bos": llama_cpp.llama_vocab_bos(vocabulary),
    }


def _ids(llama_cpp: Any, vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    room = len(data) + 16  # a token is at least a byte, but for a prefixed space
    tokens = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, room, False, True)
    if count < 0:
        sys.exit(f"error: llama.cpp needs {-count} tokens for {len(data)} bytes")
    return list(tokens[:count])


def load(llama_cpp: Any, model: str) -> dict[str, Any]:
    """Load a model with its tensors, as inference would, and check their numbers."""
    loaded = _model(llama_cpp, model, vocab_only=False)
    return {"parameters": llama_cpp.llama_model_n_params(loaded), "bytes": llama_cpp.llama_model_size(loaded)}


def chat(llama_cpp: Any, model: str, conversations: list[list[dict[str, str]]]) -> dict[str, Any]:
    """Render conversations by the template in the file, as others do."""
    from tunemill.gguf import chat  # Jinja, which the other tasks do without

    return chat.chat(llama_cpp, _model(llama_cpp, model, vocab_only=True), conversations)


def measure(llama_cpp: Any, model: str, probes: str, target: str) -> dict[str, Any]:
    """Put a probe set to a model; write its distributions into the directory ``target``."""
    from tunemill.gguf.answer import answer  # numpy, which the other tasks do without

    return answer(llama_cpp, _model(llama_cpp, model, vocab_only=False), probes, target)


def differences(llama_cpp: Any, pairs: list[list[dict[str, Any]]]) -> list[float | None]:
    """Return the largest difference of each pair of tensors."""
    from tunemill.gguf import dequantize

    return dequantize.differences(llama_cpp, pairs)


def speed(llama_cpp: Any, model: str) -> dict[str, float]:
    """Time a model with all of this machine, its GPU included."""
    from tunemill.gguf.speed import tokens_per_second

    loaded = _model(llama_cpp, model, vocab_only=False, gpu_layers=-1)
    return tokens_per_second(llama_cpp, loaded, os.cpu_count() or 1)


def imatrix(
    llama_cpp: Any, model: str, texts: list[list[str]], target: str, settings: dict[str, Any], gpu_layers: int
) -> dict[str, Any]:
    """Write the importance matrix of a model over texts, each given as its parts."""
    from tunemill.gguf.activations import Settings, collect

    loaded = _model(llama_cpp, model, vocab_only=False, gpu_layers=gpu_layers)
    vocabulary, chosen = llama_cpp.llama_model_get_vocab(loaded), Settings(**settings)
    tokens = [[token for part in parts for token in _ids(llama_cpp, vocabulary, part)] for parts in texts]
    collect(llama_cpp, loaded, [ids[: chosen.chunk] for ids in tokens], Path(target), chosen)
    return {"tokens": [len(ids) for ids in tokens]}


def _model(llama_cpp: Any, path: str, vocab_only: bool, gpu_layers: int = 0) -> Any:
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = vocab_only
    parameters.check_tensors = True
    parameters.n_gpu_layers = gpu_layers
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        sys.exit(1)
    return model


if __name__ == "__main__":
    main(sys.argv[1])
