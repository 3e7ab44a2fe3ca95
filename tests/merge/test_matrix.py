"""Every kind of adapter on every kind of model, against PEFT's own merge, tensor for tensor."""

import pytest

from tunemill.merge.merge import merge

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ONE = {"r": 4, "lora_alpha": 8}
GPT2 = {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc", "c_proj"]}

CASES = {
    "llama-dora": ("Llama", {}, {"target_modules": LINEAR, "use_dora": True}),
    "llama-dora-rslora": (
        "Llama",
        {},
        {
            "target_modules": LINEAR,
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {"layers.1.*_proj": 3},
        },
    ),
    "llama-dora-embedding": ("Llama", {}, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "llama-biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        {"target_modules": LINEAR, "bias": "all"},
    ),
    "llama-lora-bias": (
        "Llama",
        {"attention_bias": True},
        {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    ),
    "llama-tokens": ("Llama", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 90, 7]}),
    "llama-tokens-of-both": (
        "Llama",
        {},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
    ),
    "llama-parameter": ("Llama", {}, {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}),
    "qwen2-only-their-biases": ("Qwen2", {}, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "qwen3-dora": ("Qwen3", {}, {"target_modules": "all-linear", "use_dora": True}),
    "gemma-tied": ("Gemma", {}, {"target_modules": LINEAR, "use_rslora": True}),
    "gemma2-tied-tokens": ("Gemma2", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 95]}),
    "gpt2": ("GPT2", {}, GPT2 | {"bias": "all"}),
    "gpt2-dora": ("GPT2", {}, GPT2 | {"use_dora": True}),
    "gpt2-lora-bias": ("GPT2", {}, GPT2 | {"lora_bias": True}),
    "mixtral-experts": (
        "Mixtral",
        {"num_local_experts": 3},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "mixtral-down-and-router": (
        "Mixtral",
        {"num_local_experts": 3},
        {
            "target_modules": [],
            "target_parameters": ["experts.down_proj", "mlp.gate.weight"],
            "use_rslora": True,
        },
    ),
    "mixtral-experts-by-their-old-names": (
        "Mixtral",
        {"num_local_experts": 3},
        {"target_modules": ["w1", "w2", "w3", "q_proj", "gate"]},
    ),
    "qwen2-moe-experts": (
        "Qwen2Moe",
        MOE | {"shared_expert_intermediate_size": 24},
        {"target_modules": ["up_proj", "shared_expert_gate"], "target_parameters": EXPERTS},
    ),
    "qwen3-moe-experts": (
        "Qwen3Moe",
        MOE,
        {
            "target_modules": LINEAR[:4],
            "target_parameters": EXPERTS,
            "rank_pattern": {r"experts\.gate_up_proj": 2},
        },
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge(tmp_path, models, work, dtype, case):
    from peft import PeftModel

    architecture, shape, settings = CASES[case]
    base = models.tiny(architecture, tmp_path / "base", dtype, **shape)
    adapter = models.random_adapter(models.load(base), tmp_path / "adapter", **ONE, **settings)
    facts = merge(work(base, adapter))
    PeftModel.from_pretrained(models.load(base), adapter).merge_and_unload().save_pretrained(
        tmp_path / "peft"
    )
    ours, theirs, before = (models.read(tmp_path / name) for name in ("out", "peft", "base"))
    assert models.compare(ours, theirs, before, dtype) == facts["tensors_changed"] > 0
