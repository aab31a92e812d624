"""A tiny random model of any causal LM type that transformers knows, its sizes found by name."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MAX_PARAMETERS = 25_000_000  # of what the names below do not reach

_NUM_LAYERS = 4
_SIZES: dict[str, Any] = {
    name: size
    for size, names in {
        128: "vocab_size n_vocab vocab_size_per_layer_input",
        64: "hidden_size d_model n_embd embedding_size dim emb_dim lru_width",
        96: "intermediate_size ffn_dim n_inner d_ff dff decoder_ffn_dim encoder_ffn_dim"
        " ffn_hidden_size dim_ff",
        _NUM_LAYERS: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers"
        " num_attention_heads n_head num_heads n_heads decoder_attention_heads attention_heads"
        " encoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts"
        " linear_num_value_heads",
        2: "num_key_value_heads n_kv_heads num_experts_per_tok num_experts_per_token moe_topk"
        " moe_k moe_top_k num_selected_experts linear_num_key_heads n_mamba_heads index_n_heads",
        1: "n_group topk_group n_shared_experts num_shared_experts mamba_n_groups mamba_ngroups"
        " bos_token_id num_kv_shared_layers",
        0: "pad_token_id n_hash_layers",
        16: "head_dim global_head_dim attention_head_dim kv_channels d_head swa_head_dim v_head_dim"
        " mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim kv_lora_rank"
        " q_lora_rank o_lora_rank index_head_dim query_pre_attn_scalar",
        8: "mamba_n_heads mamba_num_heads mamba_d_state ssm_state_size rotary_dim qk_rope_head_dim"
        " qk_nope_head_dim laurel_rank hidden_size_per_layer_input index_topk",
        32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"
        " moe_ffn_hidden_size sliding_window attention_window_size sliding_window_size"
        " local_attention window_size",
        512: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length",
        # Wide enough that attention decides the next token.
        0.2: "initializer_range init_std",
    }.items()
    for name in names.split()
}
_SIZES["mamba_d_ssm"] = 128  # mamba_n_heads * mamba_d_head
# What a default leaves out, or sets so that no layer sees all tokens.
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots1": {"n_routed_experts": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "mistral": {"sliding_window": None},
    "moshi": {"sliding_window": None},
    "zaya": {"num_experts_per_tok": 1},
}


def any_model(model_type: str, base: str | None = None) -> PreTrainedModel:
    """A tiny model in eval mode.

    Args:
        model_type: one of `MODEL_TYPES`.
        base: the attention implementation; None means the type's default.

    Raises:
        Exception: any, where the type cannot be made tiny by these rules.
    """
    config = _tiny_config(model_type)
    if base is not None:
        config._attn_implementation = base
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"{num_parameters / 1e6:.0f} million parameters are too many")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    return model


def _tiny_config(model_type: str) -> Any:
    config_class = CONFIG_MAPPING[model_type]
    parts = {
        name: _sizes_of(part)
        for name, part in (config_class.sub_configs or {}).items()
        if part is not AutoConfig
    }
    config = config_class(**_sizes_of(config_class), **parts, **_CHANGES.get(model_type, {}))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _sizes_of(config_class: Any) -> dict[str, Any]:
    default = config_class().to_dict()
    left_to_heads = ("head_dim", "num_key_value_heads")  # by default a quotient, or all heads
    changed = _CHANGES.get(config_class.model_type, {})
    sizes = {
        name: size
        for name, size in _SIZES.items()
        if name in default
        and name not in changed
        and not isinstance(default[name], dict)
        and (default[name] is not None or name in left_to_heads)
    }
    if default.get("layer_types") and "layer_types" not in changed:
        # Every kind of layer, in turn; full attention last, because some types want it there.
        kinds = list(dict.fromkeys(default["layer_types"]))
        layers = (kinds * _NUM_LAYERS)[:_NUM_LAYERS]
        if "full_attention" in kinds:
            layers[-1] = "full_attention"
        sizes["layer_types"] = layers
    if isinstance(default.get("mlp_layer_types"), list):
        sizes["mlp_layer_types"] = [*default["mlp_layer_types"][:3], default["mlp_layer_types"][-1]]
    return sizes
