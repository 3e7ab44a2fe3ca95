"""One loaded GGUF: its vocabulary, its limits, and nothing of the text that goes through it.

llama.cpp reports what went wrong only in its log, so the log is kept here and its last error
lines become part of ours. Texts are tokenized as in training: without added special tokens, with
special tokens in the text recognised.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp

from tunemill.errors import BadDataError, ConfigurationError
from tunemill.llama import load_llama

log = logging.getLogger("tunemill.llama_cpp")
_last_errors: deque[str] = deque(maxlen=3)
_LOG_LEVELS = {2: logging.DEBUG, 3: logging.DEBUG, 4: logging.ERROR}
_LLAMA_ERROR = 4  # GGML_LOG_LEVEL_ERROR


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _data: object) -> None:
    line = text.decode(errors="replace").strip()
    log.debug("%s", line)
    if level == _LLAMA_ERROR and line:
        _last_errors.append(line)


def listen() -> None:
    """Take over llama.cpp's log, which otherwise goes straight to stderr, and make it ready."""
    llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))
    load_llama()


def last_error() -> str:
    """Return and forget the most telling error llama.cpp logged, or an empty string."""
    first = _last_errors[0] if _last_errors else ""
    _last_errors.clear()
    return first


class Model:
    """A GGUF in memory, with a LoRA for it if one is given. Close it, or use it as a context manager.

    Raises:
        BadDataError: llama.cpp cannot load the file, or the LoRA is for another model.
        ConfigurationError: its kind of model cannot branch sequences, which scoring needs.
    """

    def __init__(self, path: Path, gpu_layers: int = -1, lora: Path | None = None) -> None:
        listen()
        last_error()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self.path = path
        self.handle: Any = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise BadDataError(
                f"llama.cpp cannot load {path.name}: {last_error() or 'no reason given'}; convert it again"
            )
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self.handle)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.trained_context = int(llama_cpp.llama_model_n_ctx_train(self.handle))
        self.size = int(llama_cpp.llama_model_size(self.handle))
        """Bytes of weights."""
        self.on_gpu = gpu_layers != 0 and bool(llama_cpp.llama_supports_gpu_offload())
        self._refuse_unfit()
        self._lora = self._load_lora(lora) if lora else None

    def _load_lora(self, path: Path) -> Any:
        last_error()
        adapter = llama_cpp.llama_adapter_lora_init(self.handle, os.fsencode(path))
        if not adapter:
            self.close()
            raise BadDataError(
                f"llama.cpp cannot apply {path.name} to {self.path.name}: "
                f"{last_error() or 'no reason given'}; give the GGUF of the base it was trained on"
            )
        return adapter

    def adapt(self, context: Any) -> None:
        """Have a context compute with the LoRA, if there is one; it is freed with the model."""
        if self._lora is not None:
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._lora)
            llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))

    def _refuse_unfit(self) -> None:
        if llama_cpp.llama_model_is_recurrent(self.handle) or llama_cpp.llama_model_is_hybrid(self.handle):
            kind = "recurrent"
        elif llama_cpp.llama_model_has_encoder(self.handle):
            kind = "encoder-decoder"
        elif llama_cpp.llama_model_is_diffusion(self.handle):
            kind = "diffusion"
        else:
            return
        self.close()
        raise ConfigurationError(
            f"{self.path.name} is a {kind} model, which cannot share a prompt between answers: "
            "choose a decoder-only transformer"
        )

    def tokens(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a rendered text, special tokens in it recognised, none added."""
        raw = text.encode()
        room = len(raw) + 8
        while True:
            buffer = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), buffer, room, False, True)
            if count >= 0:
                return tuple(buffer[:count])
            room = -count

    def text(self, tokens: Sequence[int]) -> str:
        """Return what tokens spell, special ones left out; cut-off UTF-8 becomes U+FFFD."""
        return b"".join(map(self.piece, tokens)).decode(errors="replace")

    def piece(self, token: int) -> bytes:
        """Return what one token spells, in UTF-8 that may be cut off; nothing for special ones."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def ends_turn(self, token: int) -> bool:
        """Tell whether a token ends the answer: EOS, end of turn and their like."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Free the weights; safe to call twice."""
        if self.handle:
            llama_cpp.llama_model_free(self.handle)
            self.handle = None

    def __enter__(self) -> Self:
        """Return the model itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the weights."""
        self.close()
