"""The names and sizes of llama.cpp's number formats, by its own spelling.

Numbers are those of ``ggml_type`` and ``llama_ftype`` in the pinned llama.cpp; a test compares them
with the installed library.
"""

from __future__ import annotations

import difflib

from tunemill.errors import UsageError

BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""Number of a tensor type to its name, numbers per block and bytes per block."""

FILE_TYPES: dict[str, int] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4_MOE": 38,
    "NVFP4": 39,
    "Q1_0": 40,
    "Q2_0": 41,
}
"""Name of a whole-file type to its number."""

UNQUANTIZED = ("F32", "F16", "BF16")
NEED_IMATRIX = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"),
    "Q2_K_S",
)
"""Whole-file types that llama.cpp refuses to make without an importance matrix."""
TENSORS_NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
"""The same of single tensors."""
ONLY_RUN = ("NVFP4",)
"""Whole-file types that llama.cpp runs but does not make; single tensors it does."""
QUANTS = tuple(name for name in FILE_TYPES if name not in UNQUANTIZED + ONLY_RUN)
MADE = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"),
    *("MXFP4", "NVFP4", "Q1_0", "Q2_0", "F32", "F16", "BF16"),
)
"""Tensor types that the quantizer can write; the others only occur in computing."""


def file_type(name: str) -> int:
    """Return llama.cpp's number of a quantization type.

    Raises:
        UsageError: there is no such type.
    """
    if name in UNQUANTIZED:
        raise UsageError(f"quant {name} needs no quantization: run convert with outtype={name.lower()}")
    if name in ONLY_RUN:
        raise UsageError(f"quant {name}: llama.cpp makes no such file; try tensor_type=[ffn=NVFP4] with Q8_0")
    if name not in QUANTS:
        raise UsageError(
            f"unknown quant {name!r}: did you mean {_nearest(name, QUANTS)}? {', '.join(QUANTS)}"
        )
    return FILE_TYPES[name]


def tensor_type(name: str) -> int:
    """Return llama.cpp's number of a tensor type.

    Raises:
        UsageError: there is no such type, or none that the quantizer writes.
    """
    if name not in MADE:
        raise UsageError(f"unknown tensor type {name!r}: did you mean {_nearest(name, MADE)}?")
    return tensor_number(name)


def tensor_number(name: str) -> int:
    """Return llama.cpp's number of a tensor type that occurs in a file."""
    return next(number for number, (known, _, _) in BLOCKS.items() if known == name)


def file_type_name(number: int) -> str:
    """Return the name of a whole-file type, or its number where it has none here."""
    return next((name for name, known in FILE_TYPES.items() if known == number), str(number))


def _nearest(name: str, known: tuple[str, ...]) -> str:
    return difflib.get_close_matches(name.upper(), known, n=1, cutoff=0)[0]
