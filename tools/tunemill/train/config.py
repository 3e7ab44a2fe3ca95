"""What train may be told, and what it takes and gives.

Every field of trl.SFTConfig and peft.LoraConfig is a key of its own here, beside Tunemill's own
few: ``TrainConfig`` is made from ``options/fields.json``, so ``--help`` imports neither library.
Such a key is ``None`` until it is set; ``model_fields_set`` tells an unset one from one set to
null. Its value is checked by the library's own type in ``check``, before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from tunemill.parity.config import ProbesConfig
from tunemill.work import Stage

REFUSED: Mapping[str, str] = {
    "output_dir": "the stage writes to the artifact it makes",
    "push_to_hub": "publish with the store's export instead, once the result is checked",
    "hub_token": "no token belongs in a recipe, which is kept in the provenance",
    "hub_model_id": "nothing is pushed to the Hub while training",
    "hub_strategy": "nothing is pushed to the Hub while training",
    "hub_always_push": "nothing is pushed to the Hub while training",
    "hub_private_repo": "nothing is pushed to the Hub while training",
    "hub_revision": "nothing is pushed to the Hub while training",
    "trust_remote_code": "a model's own Python code is never run",
    "ensure_weight_tying": "trained embeddings and the head are merged apart, each with its own weights",
    "model_init_kwargs": "set dtype, attn_implementation and bnb_4bit_* by name",
    "resume_from_checkpoint": "a stopped run resumes from its last checkpoint by itself",
    "ignore_data_skip": "a resumed run must see the batches that an unstopped one would see",
    "save_only_model": "a checkpoint without the optimizer's state cannot be resumed from",
    "save_strategy": "checkpoints go to the store every save_steps steps",
    "save_on_each_node": "checkpoints go to the store, once",
    "save_total_limit": "the store keeps and collects checkpoints",
    "load_best_model_at_end": "the adapter after the last step is the result",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "disable_tqdm": "Tunemill shows the progress itself",
    "chat_template_path": "set chat_template in the model recipe, so that every stage has the same",
    "eos_token": "the end of a turn comes from the base model's chat template",
    "pad_token": "padding is masked; the tokenizer's own pad token or EOS is used",
    "dataset_kwargs": "the data artifact is tokenized by the stage",
    "dataset_text_field": "the data artifact's columns are fixed",
    "dataset_num_proc": "the data artifact is tokenized by the stage",
    "completion_only_loss": "the loss is always on the completion only",
    "assistant_only_loss": "the loss is always on the completion only",
    "do_train": "the stage always trains",
    "do_eval": "set eval_strategy",
    "do_predict": "predicting is the infer stage's work",
    "full_determinism": "set deterministic",
    "local_rank": "the launcher sets it",
    "auto_find_batch_size": "the result would depend on the memory that happens to be free",
    "base_model_name_or_path": "it is the base artifact's reference",
    "revision": "the base artifact's digest is the revision",
    "peft_type": "the method is LoRA",
    "task_type": "the task is causal language modelling",
    "inference_mode": "an adapter in training is trainable",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "fsdp": "processes hold the whole model each; a sharded one fits no checkpoint yet",
    "fsdp_config": "processes hold the whole model each; a sharded one fits no checkpoint yet",
    "deepspeed": "processes hold the whole model each; a sharded one fits no checkpoint yet",
    "parallelism_config": "processes hold the whole model each; a sharded one fits no checkpoint yet",
    "runtime_config": "it is not part of an adapter",
    "loftq_config": "LoftQ rewrites the base weights, which the merge would not know",
    "layer_replication": "it changes the base model's layers, which the merge would not know",
}
"""Fields of the two libraries that a recipe may not set, each with the reason shown."""

OWN = ("seed", "report_to", "max_length")
"""SFTConfig fields that TrainConfig declares with its own type or default."""


@lru_cache(maxsize=1)
def library_fields() -> dict[str, dict[str, dict[str, str]]]:
    """Return ``{"sft" | "lora": {name: {"type", "default"}}}`` as generated."""
    text = files("tunemill.train.options").joinpath("fields.json").read_text("utf-8")
    fields: dict[str, dict[str, dict[str, str]]] = json.loads(text)
    return fields


class TrainBase(ProbesConfig):
    """Tunemill's own keys of training; ``TrainConfig`` adds the libraries'."""

    method: Literal["lora", "qlora", "full"] = Field(
        "lora", description="lora, qlora (LoRA over the base in 4 bits), or full (every weight)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type to compute in; auto is bfloat16 where the hardware has it, else float32"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = Field(
        None, description="Attention of the model; the library's own choice if not given"
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit type of qlora's base")
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type that qlora's 4-bit weights are multiplied in; auto is dtype"
    )
    bnb_4bit_use_double_quant: bool = Field(
        True, description="Quantize qlora's quantization constants too: 0.4 bits less per weight"
    )
    deterministic: bool = Field(
        True, description="Use only deterministic kernels: the same seed and machine give the same adapter"
    )
    max_length: Annotated[int, Field(gt=1)] | None = Field(
        1024, description="Most tokens of prompt and completion together; longer rows are an error"
    )
    max_train_samples: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Train on that many rows, drawn by the seed: a larger number holds the rows of a smaller "
        "one; all rows if not given",
    )
    seed: int = Field(42, ge=0, description="Seed of everything random")
    report_to: Literal["none", "wandb", "tensorboard"] = Field(
        "none", description="Where metrics go besides the artifact: wandb, tensorboard or none"
    )
    preflight: bool = Field(
        True,
        description="Refuse to train what llama.cpp could not convert or would tokenize otherwise; "
        "false for a model whose end is no GGUF",
        json_schema_extra={"identity": False},
    )
    memory_check: bool = Field(
        True,
        description="Refuse before loading what clearly does not fit into memory",
        json_schema_extra={"identity": False},
    )

    @model_validator(mode="after")
    def _refuse(self) -> TrainBase:
        refused = sorted(self.model_fields_set & set(REFUSED))
        problems = [f"{name} cannot be set: {REFUSED[name]}" for name in refused]
        if self._rewrites_base():
            problems.append(
                f"init_lora_weights={self.lora()['init_lora_weights']} cannot be set: it changes the base "
                "weights, which the merge would not know"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rewrites_base(self) -> bool:
        initial = str(self.lora().get("init_lora_weights"))
        return initial.startswith(("pissa", "olora", "corda", "loftq", "mica"))

    def sft(self) -> dict[str, Any]:
        """Return the trl.SFTConfig fields that were set, by name."""
        return self._set("sft")

    def lora(self) -> dict[str, Any]:
        """Return the peft.LoraConfig fields that were set, by name."""
        return self._set("lora")

    def _set(self, library: str) -> dict[str, Any]:
        names = self.model_fields_set & set(library_fields()[library]) - set(OWN)
        return {name: getattr(self, name) for name in sorted(names)}


def _pass_through() -> dict[str, Any]:
    """The libraries' fields as pydantic fields; of any type here, checked by ``check``."""
    titles = {"sft": "trl.SFTConfig", "lora": "peft.LoraConfig"}
    return {
        name: (Any, Field(None, description=_describe(titles[library], name, field)))
        for library, fields in library_fields().items()
        for name, field in fields.items()
        if name not in OWN
    }


def _describe(title: str, name: str, field: Mapping[str, str]) -> str:
    if name in REFUSED:
        return f"Cannot be set: {REFUSED[name]}"
    return f"{title}: {field['type']}, {field['default']} if not set"


TrainConfig: type[TrainBase] = create_model(
    "TrainConfig",
    __base__=TrainBase,
    __module__=__name__,
    __doc__="How to fine-tune: Tunemill's own keys, then every SFTConfig and LoraConfig field.",
    **_pass_through(),
)

STAGE = Stage(
    name="train",
    summary="Fine-tune the base model by LoRA, QLoRA or in full",
    config=TrainConfig,
    inputs={"base": "base/{model}", "data": "{run}/data"},
    output="{run}/adapter",
    kind="adapter",
    work="tunemill.train.sft:train",
    check="tunemill.train.options.validate:check",
    before="tunemill.gguf.preflight:before_training",
    stops_itself=True,
    group="tunemill.train.ranks:joined",
)
