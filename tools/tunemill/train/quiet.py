"""Libraries say what went wrong, and nothing else: Tunemill reports what is going on itself."""

from __future__ import annotations

import logging
import warnings

LOUD = ("transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "matplotlib")

HARMLESS = (
    # The merge gives such a model output embeddings of its own.
    r"Model has `tie_word_embeddings=True`",
)


def quieten() -> None:
    """Keep the libraries from logging below errors and from drawing bars; call it before importing them."""
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
