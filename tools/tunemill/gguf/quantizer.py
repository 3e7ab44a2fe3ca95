"""Calls llama.cpp's quantizer; runs inside the child process.

Besides plain settings its parameters hold pointers to lists that end with an empty entry: types of
single tensors, the importance matrix, and metadata that says which matrix was used, in the keys that
llama.cpp's own program writes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunemill.gguf.imatrix import Imatrix, read_imatrix

INTEGER, TEXT = 0, 3  # LLAMA_KV_OVERRIDE_TYPE_INT and _STR
MOST_TEXT = 127  # bytes of a text, its final zero byte excluded


def quantize(
    llama_cpp: Any,
    source: str,
    target: str,
    settings: Mapping[str, Any],
    tensor_types: Sequence[tuple[str, int]] = (),
    imatrix: str | None = None,
) -> None:
    """Quantize one file; ``settings`` are fields of ``llama_model_quantize_params``.

    ``tensor_types`` are regular expressions of tensor names with types; the first that is found in a
    name counts. ``imatrix`` is the file of an importance matrix.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    for name, value in settings.items():
        setattr(parameters, name, value)
    if tensor_types:
        parameters.tt_overrides = _tensor_types(llama_cpp, tensor_types)
    if imatrix:
        matrix = read_imatrix(Path(imatrix))
        importance = matrix.importance()  # llama.cpp reads these arrays, so they have to outlive the call
        parameters.imatrix = _entries(llama_cpp, importance)
        parameters.kv_overrides = _metadata(llama_cpp, matrix, Path(imatrix).name)
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    if status != 0:
        sys.exit(1)  # the log says why


def _tensor_types(llama_cpp: Any, wanted: Sequence[tuple[str, int]]) -> Any:
    made = (llama_cpp.llama_model_tensor_override * (len(wanted) + 1))()
    for entry, (pattern, number) in zip(made, wanted, strict=False):
        entry.pattern, entry.type = pattern.encode(), number
    return made


def _entries(llama_cpp: Any, importance: Mapping[str, Any]) -> Any:
    made = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(made, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return made


def _metadata(llama_cpp: Any, matrix: Imatrix, file: str) -> Any:
    texts = {"file": file, "dataset": matrix.datasets[0] if matrix.datasets else ""}
    numbers = {"entries_count": len(matrix.sums), "chunks_count": matrix.chunks}
    made = (llama_cpp.llama_model_kv_override * (len(texts) + len(numbers) + 1))()
    for entry, (key, value) in zip(made, [*texts.items(), *numbers.items()], strict=False):
        entry.key = f"quantize.imatrix.{key}".encode()
        if isinstance(value, str):
            entry.tag, entry.value.val_str = TEXT, value.encode()[:MOST_TEXT]
        else:
            entry.tag, entry.value.val_i64 = INTEGER, value
    return made
