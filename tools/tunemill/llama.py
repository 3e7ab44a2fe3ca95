"""Loads llama.cpp: the one place that imports ``llama_cpp``'s library and its backends.

Where the CPU code was compiled in several versions, or the GPU's as a library of its own, llama.cpp
does nothing until they are loaded; it then takes the version that suits this processor best. In a build
of one piece there is nothing to load.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

from tunemill.kernels import installed


@lru_cache(maxsize=1)
def load_llama() -> Any:
    """Return the module ``llama_cpp`` with its backends loaded.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    import llama_cpp

    directory = libraries()
    _library(directory, "ggml").ggml_backend_load_all_from_path(str(directory).encode())
    llama_cpp.llama_backend_init()
    return llama_cpp


def libraries() -> Path:
    """Return the folder of the compiled libraries.

    Raises:
        ModuleNotFoundError: there are none.
    """
    found = installed()
    if found is None:
        raise ModuleNotFoundError("the libraries of llama-cpp-python are missing", name="llama_cpp")
    return found


def build_of(llama_cpp: Any) -> dict[str, str]:
    """Return what identifies the library: version, ggml's build, and what it was compiled to use."""
    base = _library(libraries(), "ggml-base")
    facts = {"version": llama_cpp.__version__, "system_info": llama_cpp.llama_print_system_info().decode()}
    for name in ("ggml_version", "ggml_commit"):
        function = getattr(base, name)
        function.restype = ctypes.c_char_p
        facts[name] = function().decode()
    return facts


def ggml_base() -> ctypes.CDLL:
    """Return the library of tensors, with the types of the functions that are used of it."""
    base = _library(libraries(), "ggml-base")
    base.ggml_op_name.restype = base.ggml_get_name.restype = ctypes.c_char_p
    base.ggml_get_name.argtypes = base.ggml_nbytes.argtypes = [ctypes.c_void_p]
    base.ggml_nbytes.restype = ctypes.c_size_t
    base.ggml_backend_tensor_get.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_size_t, ctypes.c_size_t),
    ]
    base.ggml_backend_tensor_get.restype = None
    return base


def _library(directory: Path, name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(next(directory.glob(f"*{name}.*"))))
