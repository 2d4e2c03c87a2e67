"""Configurations as they were released, with fields that tiny models do not have: read whole, and as large as their
publishers say.

Sources of the sizes: arXiv 2412.19437 (DeepSeek-V3), 2510.26692 (Kimi Linear), 2512.20848 (Nemotron 3), 2509.01322
(LongCat-Flash), 2508.10925 (gpt-oss), the model cards of LFM2, Granite 4 and GLM-4.7.
"""

import pytest

from lm.accounting import model_cost
from lm.published.families import FAMILIES, family_of
from lm.published.wrapper import decoder_of

COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
DEEPSEEK_V3 = {
    **{"model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1},
    **{"first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512},
    **{"moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8},
    **{"num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000},
    "rope_scaling": {
        **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"},
        "original_max_position_embeddings": 4096,
    },
    **{"routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4},
    **{"topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840},
}
GLM_LITE = {
    **{"model_type": "glm4_moe_lite", "attention_bias": False, "attention_dropout": 0.0, "hidden_size": 2048},
    **{"intermediate_size": 10240, "topk_method": "noaux_tc", "norm_topk_prob": True, "num_attention_heads": 20},
    **{"n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8},
    **{"num_experts_per_tok": 4, "first_k_dense_replace": 1, "num_hidden_layers": 47, "num_key_value_heads": 20},
    **{"num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05, "rope_scaling": None},
    **{"rope_theta": 1000000, "tie_word_embeddings": False, "q_lora_rank": 768, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "vocab_size": 154880},
    "moe_intermediate_size": 1536,
}
QWEN3_NEXT = {
    **{"model_type": "qwen3_next", "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1},
    **{"full_attention_interval": 4, "head_dim": 256, "hidden_size": 2048, "intermediate_size": 5120},
    **{"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16},
    **{"linear_num_value_heads": 32, "linear_value_head_dim": 128, "mlp_only_layers": []},
    **{"moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512},
    **{"num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False},
    **{"partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000},
    **{"router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False},
    **{"use_sliding_window": False, "vocab_size": 151936, "max_position_embeddings": 262144},
}
QWEN3_5 = {
    **{"model_type": "qwen3_5_moe", "image_token_id": 248056, "video_token_id": 248057, "tie_word_embeddings": False},
    **{"vision_start_token_id": 248053, "vision_end_token_id": 248054, "vision_config": {"depth": 27}},
    "text_config": {
        **{"model_type": "qwen3_5_moe_text", "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16"},
        **{"attn_output_gate": True, "full_attention_interval": 4, "head_dim": 256, "hidden_size": 2048},
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
        **{"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16},
        **{"linear_num_value_heads": 32, "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32"},
        **{"max_position_embeddings": 262144, "mlp_only_layers": [], "moe_intermediate_size": 512},
        **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 16},
        **{"num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 40, "num_key_value_heads": 2},
        **{"rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512},
        **{"vocab_size": 248320, "partial_rotary_factor": 0.25},
        "rope_parameters": {
            **{"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default"},
            **{"rope_theta": 10000000, "partial_rotary_factor": 0.25},
        },
    },
}
FULL = [4, 8, 12, 16, 20, 24, 27]
KIMI_LINEAR = {
    **{"model_type": "kimi_linear", "first_k_dense_replace": 1, "head_dim": 72, "hidden_size": 2304},
    **{"intermediate_size": 9216, "kv_lora_rank": 512, "mla_use_nope": True, "model_max_length": 1048576},
    "linear_attn_config": {
        **{"full_attn_layers": FULL, "kda_layers": [layer for layer in range(1, 28) if layer not in FULL]},
        **{"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4},
    },
    **{"moe_intermediate_size": 1024, "moe_layer_freq": 1, "moe_renormalize": True, "num_expert_group": 1},
    **{"moe_router_activation_func": "sigmoid", "num_attention_heads": 32, "num_experts": 256},
    **{"num_experts_per_token": 8, "num_hidden_layers": 27, "num_key_value_heads": 32, "num_shared_experts": 1},
    **{"num_nextn_predict_layers": 0, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
    **{"rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "routed_scaling_factor": 2.446},
    **{"tie_word_embeddings": False, "topk_group": 1, "use_grouped_topk": True, "v_head_dim": 128},
    "vocab_size": 163840,
}
NEMOTRON_3_NANO = {
    **{"model_type": "nemotron_h", "attention_bias": False, "attention_dropout": 0.0, "chunk_size": 128},
    **{"conv_kernel": 4, "expand": 2, "head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 2688},
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    **{"intermediate_size": 1856, "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64, "mamba_hidden_act": "silu"},
    **{"mamba_num_heads": 64, "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32", "mlp_bias": False},
    **{"mlp_hidden_act": "relu2", "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712},
    **{"n_group": 1, "n_groups": 8, "n_routed_experts": 128, "n_shared_experts": 1, "norm_eps": 1e-05},
    **{"norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 52},
    **{"num_key_value_heads": 2, "num_logits_to_keep": 1, "partial_rotary_factor": 1.0, "rope_theta": 10000},
    **{"rescale_prenorm_residual": True, "residual_in_fp32": False, "routed_scaling_factor": 2.5},
    **{"sliding_window": None, "ssm_state_size": 128, "tie_word_embeddings": False, "time_step_floor": 0.0001},
    **{"time_step_limit": [0.0, float("inf")], "time_step_max": 0.1, "time_step_min": 0.001, "topk_group": 1},
    **{"use_bias": False, "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072},
}
GRANITE_TINY = {
    **{"model_type": "granitemoehybrid", "attention_bias": False, "attention_dropout": 0.0},
    **{"attention_multiplier": 0.0078125, "embedding_multiplier": 12, "hidden_size": 1536, "init_method": "mup"},
    **{"intermediate_size": 512, "logits_scaling": 6, "mamba_chunk_size": 256, "mamba_conv_bias": True},
    "layer_types": ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)],
    **{"mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1},
    **{"mamba_n_heads": 48, "mamba_proj_bias": False, "normalization_function": "rmsnorm"},
    **{"num_attention_heads": 12, "num_experts_per_tok": 6, "num_hidden_layers": 40, "num_key_value_heads": 4},
    **{"num_local_experts": 64, "position_embedding_type": "nope", "residual_multiplier": 0.22},
    **{"rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.0001},
    **{"shared_intermediate_size": 1024, "tie_word_embeddings": True, "vocab_size": 100352},
}
LFM2_FULL = (2, 6, 10, 14, 18, 21)
LFM2_8B = {
    **{"model_type": "lfm2_moe", "conv_L_cache": 3, "conv_bias": False, "hidden_size": 2048},
    **{"intermediate_size": 7168, "moe_intermediate_size": 1792, "norm_eps": 1e-05, "norm_topk_prob": True},
    "layer_types": ["full_attention" if layer in LFM2_FULL else "conv" for layer in range(24)],
    **{"num_attention_heads": 32, "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4},
    **{"num_hidden_layers": 24, "num_key_value_heads": 8, "rope_theta": 1000000.0, "routed_scaling_factor": 1.0},
    **{"use_expert_bias": True, "vocab_size": 65536},
}
LONGCAT_FLASH = {
    **{"model_type": "longcat_flash", "attention_bias": False, "attention_dropout": 0.0, "attention_method": "MLA"},
    **{"expert_ffn_hidden_size": 2048, "ffn_hidden_size": 12288, "hidden_size": 6144, "kv_lora_rank": 512},
    **{"mla_scale_kv_lora": True, "mla_scale_q_lora": True, "moe_topk": 12, "n_routed_experts": 512},
    **{"norm_topk_prob": False, "num_attention_heads": 64, "num_layers": 28, "q_lora_rank": 1536},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_theta": 10000000.0},
    **{"routed_scaling_factor": 6.0, "router_bias": False, "v_head_dim": 128, "vocab_size": 131072},
    **{"zero_expert_num": 256, "zero_expert_type": "identity"},
}
GPT_OSS_20B = {
    **{"model_type": "gpt_oss", "attention_bias": True, "attention_dropout": 0.0, "experts_per_token": 4},
    **{"head_dim": 64, "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880},
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    **{"num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8},
    **{"num_local_experts": 32, "rms_norm_eps": 1e-05, "router_aux_loss_coef": 0.9, "sliding_window": 128},
    "rope_scaling": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
        **{"rope_type": "yarn", "truncate": False},
    },
    **{"rope_theta": 150000, "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088},
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    },
}
# Parameters in billions: all of them, and those that a token uses, the embedding's row not counted.
RELEASED = {
    "DeepSeek-V3": (DEEPSEEK_V3, 671.0, 36.6),
    "GLM-4.7-Flash": (GLM_LITE, 29.9, 3.6),
    "Kimi-Linear-48B-A3B": (KIMI_LINEAR, 49.1, 3.1),
    # Published as three, embedding and head (0.62) not counted.
    "Qwen3-Next-80B-A3B": (QWEN3_NEXT, 80.0, 3.56),
    "Qwen3.5-35B-A3B": (decoder_of(QWEN3_5, "Qwen3.5-35B-A3B"), 35.0, 3.0),
    "Nemotron-3-Nano-30B-A3B": (NEMOTRON_3_NANO, 31.6, 3.2),
    # Published as about one; with the tied head, and without rounding, it is more.
    "Granite-4.0-H-Tiny": (GRANITE_TINY, 6.94, 1.47),
    "LFM2-8B-A1B": (LFM2_8B, 8.34, 1.5),
    # Where none of the twelve experts is one that computes nothing.
    "LongCat-Flash": (LONGCAT_FLASH, 560.0, 31.3),
    "gpt-oss-20b": (GPT_OSS_20B, 20.9, 3.6),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_configuration_is_read_whole(name):
    values, total, active = RELEASED[name]
    config = family_of(COMMON | values, name).configuration(COMMON | values, name)
    k = next(values[name] for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk") if name in values)
    cost = model_cost(config, length=1, mean_experts=k)
    assert cost.total_parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert cost.active_parameters / 1e9 == pytest.approx(active, rel=0.08)


def test_plans_of_released_models():
    plans = {
        name: FAMILIES[v["model_type"]].configuration(COMMON | v, name).layer_plan for name, (v, *_) in RELEASED.items()
    }
    assert plans["Kimi-Linear-48B-A3B"] == "KKKA" * 6 + "KKA"
    # 52 published layers: 23 of Mamba-2 and 6 of attention, and the experts behind all but six of the former.
    assert len(plans["Nemotron-3-Nano-30B-A3B"]) == 29
    assert plans["Nemotron-3-Nano-30B-A3B"].count("F") == 6
    assert plans["LFM2-8B-A1B"].count("C") == 18
    # Two blocks for each of 28 published layers.
    assert plans["LongCat-Flash"] == "A" * 56


@pytest.mark.parametrize(
    ("name", "field", "value", "said"),
    [
        ("DeepSeek-V3", "scoring_func", "softmax", "scoring_func = 'softmax' is not supported; legal: 'sigmoid'"),
        ("DeepSeek-V3", "rope_interleave", False, "rope_interleave = False is not supported; legal: True"),
        ("DeepSeek-V3", "num_key_value_heads", 8, "num_key_value_heads = 8 is not supported; legal: 128"),
        ("GLM-4.7-Flash", "first_k_dense_replace", 2, "first_k_dense_replace = 2 is not supported; legal: 1"),
        ("GLM-4.7-Flash", "mlp_layer_types", ["dense"], "legal: 47 of dense, sparse"),
        ("Kimi-Linear-48B-A3B", "mla_use_nope", False, "mla_use_nope = False is not supported"),
        (
            "Kimi-Linear-48B-A3B",
            "linear_attn_config",
            {"full_attn_layers": [1], "kda_layers": [1]},
            "each of the layers 1 to 27",
        ),
        ("Kimi-Linear-48B-A3B", "linear_attn_config", {"gate": 1}, "linear_attn_config: gate = 1: nothing here knows"),
        ("Nemotron-3-Nano-30B-A3B", "mlp_hidden_act", "silu", "mlp_hidden_act = 'silu' is not supported"),
        ("Nemotron-3-Nano-30B-A3B", "hybrid_override_pattern", "E" * 52, "layer 0 is 'moe'; legal: linear_attention"),
        (
            "Nemotron-3-Nano-30B-A3B",
            "hybrid_override_pattern",
            "M" + "X" * 51,
            "layer 1 is 'X'; legal: linear_attention",
        ),
        ("Granite-4.0-H-Tiny", "time_step_limit", [0.0, 1.0], "legal: [shortest step, Infinity]"),
        ("Granite-4.0-H-Tiny", "mamba_conv_bias", False, "mamba_conv_bias = False is not supported; legal: True"),
        ("LFM2-8B-A1B", "use_expert_bias", False, "use_expert_bias = False is not supported; legal: True"),
        ("LFM2-8B-A1B", "layer_types", ["conv"], "legal: 24 of conv, full_attention"),
        ("LongCat-Flash", "zero_expert_type", "copy", "zero_expert_type = 'copy' is not supported; legal: 'identity'"),
        ("LongCat-Flash", "router_bias", True, "router_bias = True is not supported; legal: False"),
        ("LongCat-Flash", "zero_expert_num", 0, "n_null = 0 must be at least 1"),
        ("LongCat-Flash", "head_dim", 32, "head_dim = 32 is not supported; legal: 64"),
        (
            "gpt-oss-20b",
            "quantization_config",
            {"quant_method": "awq"},
            "quant_method = 'awq' is not supported; legal: 'mxfp4', none at all: dequantise the weights",
        ),
        ("DeepSeek-V3", "quantization_config", {"quant_method": "fp8"}, "legal: none at all: dequantise the weights"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(name, field, value, said):
    values = COMMON | RELEASED[name][0] | {field: value}
    with pytest.raises(ValueError, match=name) as refused:
        family_of(values, name).configuration(values, name)
    assert said in str(refused.value)
