"""Tunemill: from an open language model to a fine-tuned, quantized, evaluated one.

Small single-purpose stages pass artifacts through one store: fetch, prepare, train,
merge, convert, quantize, infer, evaluate.
"""

__version__ = "0.1.0"
