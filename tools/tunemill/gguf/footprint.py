"""How much memory a GGUF takes when it runs, from its header alone."""

from __future__ import annotations

from dataclasses import dataclass

from tunemill.gguf.header import GgufHeader, Long

CACHED = 2  # bytes of a number in the cache of keys and values: llama.cpp's default is F16
COMPUTED = 4  # bytes of a number under way
BATCH = 512  # tokens computed at once


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory."""

    weights: int
    cache: int
    """Keys and values of all tokens of the context."""
    computing: int
    """Logits and the widest activations of one batch."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.computing


def footprint(header: GgufHeader, context: int) -> Footprint:
    """Return what a model takes with ``context`` tokens.

    The cache holds a key and a value for each token, layer and key-value head. For models with a sliding
    window or without attention in some layers, which keep less, it is an upper bound.
    """
    heads = _number(header, "attention.head_count", 1)
    width = _number(header, "embedding_length", 0)
    per_head = width // max(1, heads)
    numbers = _number(header, "attention.key_length", per_head)
    numbers += _number(header, "attention.value_length", per_head)
    of_layers = _key_value_heads(header, heads)
    vocabulary = header.metadata.get("tokenizer.ggml.tokens")
    words = vocabulary.length if isinstance(vocabulary, Long) else 0  # no real one is short enough to be kept
    widest = words + 2 * _number(header, "feed_forward_length", 0) + 4 * width
    return Footprint(
        sum(tensor.size for tensor in header.tensors),
        context * of_layers * numbers * CACHED,
        BATCH * widest * COMPUTED,
    )


def trained_context(header: GgufHeader) -> int:
    """Return the tokens a model was trained for; 0 where it does not say."""
    return _number(header, "context_length", 0)


def _key_value_heads(header: GgufHeader, heads: int) -> int:
    """Return their number over all layers."""
    value = header.metadata.get(f"{header.architecture}.attention.head_count_kv", heads)
    if isinstance(value, tuple):
        return sum(int(entry) for entry in value)
    layers = _number(header, "block_count", 0)
    return layers * (int(value) if isinstance(value, int) else heads)


def _number(header: GgufHeader, key: str, default: int) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}", default)
    if isinstance(value, tuple):
        return max((int(entry) for entry in value), default=default)
    return int(value) if isinstance(value, int) else default
