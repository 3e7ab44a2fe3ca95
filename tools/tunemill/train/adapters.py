"""The model that is trained: loaded, quantized or not, with its adapter; and saved again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError, ConfigurationError
from tunemill.files import write_json
from tunemill.train.config import TrainBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError)
"""What transformers raises for damaged or unknown model files."""


def kept_dtype(directory: Path, config: TrainBase, dtype: str) -> str:
    """Return the type that weights are kept in while computing in ``dtype``.

    Trained weights stay in float32, as an update of a thousandth is lost in a bfloat16 weight; so
    do those of a base in float32 unless ``dtype`` was set, as such a base is small.
    """
    in_float32 = config.dtype == "auto" and config.method == "lora" and base_dtype(directory) == "float32"
    return "float32" if config.method == "full" or in_float32 else dtype


def base_dtype(directory: Path) -> str | None:
    """Return the type of the base's weights, as its configuration says; None if it does not.

    Raises:
        BadDataError: there is no configuration.
    """
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadDataError(f"the base's config.json cannot be read: {_first_line(error)}") from error
    dtype: str | None = config.get("dtype") or config.get("torch_dtype")
    return dtype


def load_model(directory: Path, config: TrainBase, dtype: str, device: str) -> Any:
    """Load the base model on ``device``, in 4 bits for qlora, to compute in ``dtype``.

    Raises:
        BadDataError: the files are damaged or of an unknown architecture.
        ConfigurationError: an attention implementation or a package is missing.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, kept_dtype(directory, config, dtype))}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.method == "qlora":
        options["quantization_config"] = _four_bit(config, dtype)
        options["device_map"] = {"": torch.cuda.current_device() if device == "cuda" else device}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
        )
    except ImportError as error:
        raise ConfigurationError(f"the model cannot be loaded here: {_first_line(error)}") from error
    except (*LOADING_ERRORS, SafetensorError) as error:
        raise BadDataError(f"the base model cannot be loaded: {_first_line(error)}") from error
    model.config.use_cache = False
    return model


def forget_place(model: Any, name: str) -> None:
    """Let the model say it came from the artifact ``name``, not from a directory here."""
    for part in (model, model.get_base_model() if hasattr(model, "get_base_model") else model):
        part.name_or_path = name
        part.config._name_or_path = name
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.base_model_name_or_path = name


def save_result(model: Any, directory: Path, method: str, dtype: str | None) -> None:
    """Write the adapter, or all weights for ``full``, as safetensors with their configuration.

    All weights are written in ``dtype``, the type of the base's files; an adapter in the type it
    was trained in.

    Raises:
        BadDataError: nothing was trained into the adapter.
    """
    if method == "full":
        import torch

        if dtype in ("float32", "bfloat16", "float16"):
            model.to(getattr(torch, dtype))
        model.save_pretrained(directory, safe_serialization=True)
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter = model.peft_config["default"]
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    if not tensors:
        raise BadDataError("no layer was adapted: set target_modules to layers that the model has")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {key: _plain(value) for key, value in adapter.to_dict().items()}
    write_json(directory / "adapter_config.json", {**settings, "inference_mode": True})


def copy_tokenizer(base: Path, destination: Path) -> None:
    """Copy the base's tokenizer files as they are: training changes no token."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, destination / name)


def count_parameters(model: Any) -> tuple[int, int]:
    """Return how many weights are trained, and how many there are, unpacking 4-bit ones."""
    sizes = [(_elements(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _four_bit(config: TrainBase, dtype: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    compute = dtype if config.bnb_4bit_compute_dtype == "auto" else config.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=getattr(torch, compute),
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
    )


def _elements(parameter: Any) -> int:
    """A 4-bit parameter holds two weights a byte."""
    packed = type(parameter).__name__ == "Params4bit"
    return int(parameter.numel() * (2 * parameter.element_size() if packed else 1))


def _plain(value: Any) -> Any:
    """Sets in a settled order: PEFT keeps target_modules as a set."""
    return sorted(value) if isinstance(value, set | frozenset) else value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
