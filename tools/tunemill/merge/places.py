"""Finds the tensors of a base's files that an adapter's changes are for.

An adapter names the modules that training saw. A checkpoint may leave out the model's own prefix, as
GPT-2's does, and holds each expert of a mixture as matrices of its own where transformers stacks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from tunemill.errors import BadDataError
from tunemill.merge.adapter import EXPERTS
from tunemill.merge.change import Change, Slice
from tunemill.weights import Tensor

HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
QWEN = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
MIXTRAL = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
STACKED = {"mixtral": MIXTRAL, "qwen2_moe": QWEN, "qwen3_moe": QWEN}
"""By ``model_type``: which matrices of a checkpoint's expert stand one above the other in a parameter."""
RENAMED = {"mixtral": (".mlp.", ".block_sparse_moe.")}
"""By ``model_type``: a part of the modules' names and what it is in checkpoints."""


def embedding_of(base: Mapping[str, Tensor]) -> str | None:
    """Return the name of the input embeddings, or None if there is not exactly one such tensor."""
    names = [name for name in base if name.endswith(EMBEDDINGS)]
    return names[0] if len(names) == 1 else None


def place_changes(
    changes: Mapping[str, Change], base: Mapping[str, Tensor], model_type: str, adapter: str
) -> dict[str, Change]:
    """Return the changes under the base's own tensor names.

    Raises:
        BadDataError: the base lacks a tensor, or stores experts in a way that is not known.
    """
    found: dict[str, Change] = {}
    for name, change in changes.items():
        for own, part in _placed(name, change, base, model_type, adapter):
            if own in found:
                raise BadDataError(f"{adapter} changes {own} twice")
            found[own] = part
    return found


def _placed(
    name: str, change: Change, base: Mapping[str, Tensor], model_type: str, adapter: str
) -> Iterator[tuple[str, Change]]:
    if any(pair.experts > 1 for pair in change.pairs) or name.endswith(EXPERTS):
        yield from _experts(name, change, base, model_type, adapter)
        return
    module, checkpoint = RENAMED.get(model_type, ("", ""))
    for own in (name, name.partition(".")[2], name.replace(module, checkpoint)):
        if own in base:
            yield own, change
            return
    if name != HEAD or embedding_of(base) is None:
        raise BadDataError(f"{adapter} was trained on another base: it changes {name}, which the base lacks")
    yield name, change


def _experts(
    name: str, change: Change, base: Mapping[str, Tensor], model_type: str, adapter: str
) -> Iterator[tuple[str, Change]]:
    module, _, parameter = name.rpartition(".")
    if model_type not in STACKED:
        raise BadDataError(
            f"{adapter} trains the experts of a model of type {model_type!r}; merge knows how "
            f"{', '.join(STACKED)} store theirs"
        )
    old, new = RENAMED.get(model_type, ("", ""))
    module, pair = module.replace(old, new), change.pairs[0]
    for expert in range(pair.experts):
        first = 0
        for matrix in STACKED[model_type][parameter]:
            own = f"{module}.{expert}.{matrix}.weight"
            if own not in base:
                raise BadDataError(
                    f"{adapter} was trained on another base: it changes {own}, which the base lacks"
                )
            yield own, replace(change, slice=Slice(expert, first))
            first += base[own].shape[0]
        if first != pair.b.shape[0] or f"{module}.{pair.experts}.{matrix}.weight" in base:
            raise BadDataError(f"{adapter} was trained on another base: its {name} has other experts")
