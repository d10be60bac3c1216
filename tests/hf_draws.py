"""Configurations of transformers, drawn: every size, switch and form of file that a family may come in."""

from typing import Any

import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moe.convert.names import FAMILIES

Fields = dict[str, Any]
FORMS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "shard": st.sampled_from(["5GB", "4KB"]),
        "is_fused": st.booleans(),  # experts of a layer in one tensor, as transformers 5 holds them in memory
    }
)
_HEAD_DIM = ("mistral", "qwen3", "mixtral", "qwen3_moe", "glm4_moe", "dots1", "gpt_oss")  # of any width
_ONE_KEY_EACH = ("deepseek_v3", "longcat_flash")


@st.composite
def drawn_fields(draw: st.DrawFn, family: str) -> Fields:
    """Draw the fields of a configuration: odd widths, one head or several, K up to all experts, any dense layers."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    layers = draw(st.integers(1, 3))
    fields: Fields = {
        "vocab_size": draw(st.integers(33, 70)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "intermediate_size": draw(st.integers(1, 21)),
        "rope_parameters": _rope(draw, family),
    }
    if family == "llama":  # heads of any width, but a hidden size that they divide
        fields |= {"head_dim": draw(st.sampled_from([2, 4, 6, 8])), "hidden_size": heads * draw(st.integers(2, 9))}
    elif family in _HEAD_DIM:
        fields |= {"head_dim": draw(st.sampled_from([2, 4, 6, 8])), "hidden_size": draw(st.integers(9, 33))}
    elif family in _ONE_KEY_EACH:
        fields |= {"num_key_value_heads": heads, "hidden_size": draw(st.integers(9, 33))}
    else:
        fields["hidden_size"] = heads * draw(st.sampled_from([2, 4, 6, 8]))
    return {**fields, **_own(draw, family, layers)}


def random_model(family: str, fields: Fields, *, seed: int) -> Any:
    """Return a model whose tensors are all drawn anew: no bias at 0 and no norm at 1, which would hide an exchange."""
    config = FAMILIES[family].config(**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "rotary" not in name:
                start = 1.0 if "norm" in name and tensor.ndim == 1 else 0.0
                tensor.copy_(start + 0.3 * torch.randn(tensor.shape, generator=draw))
    return model.eval()


def _rope(draw: st.DrawFn, family: str) -> Fields:
    kind = draw(st.sampled_from(["default", "yarn", "llama3"]))
    rope: Fields = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 5000.0, 500000.0]))}
    if kind != "default":
        rope |= {"factor": draw(st.sampled_from([1.0, 2.5, 8.0])), "original_max_position_embeddings": 32}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([1.5, 4.0]))}
    if kind == "yarn":
        rope |= draw(
            st.sampled_from([{}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"truncate": False, "beta_fast": 9.0}])
        )
    return {**rope, "partial_rotary_factor": 1.0} if family == "glm4_moe" else rope


def _own(draw: st.DrawFn, family: str, layers: int) -> Fields:
    """What only some families have."""
    window = draw(st.sampled_from([None, 1, 5]))
    switch = draw(st.booleans())
    # one expert with normalised weights is refused: its weight is always 1
    experts = draw(st.integers(2, 7))
    chosen = draw(st.integers(2 if switch or family in ("mixtral", "gpt_oss") else 1, experts))
    match family:
        case "mistral":
            return {"sliding_window": window}
        case "mixtral":
            return {"num_local_experts": experts, "num_experts_per_tok": chosen, "sliding_window": window}
        case "gpt_oss":
            return {
                "num_local_experts": experts,
                "num_experts_per_tok": chosen,
                "sliding_window": window or 3,
                "attention_bias": switch,
            }
        case "olmoe":
            return {"num_experts": experts, "num_experts_per_tok": chosen, "norm_topk_prob": switch}
        case "qwen2_moe" | "qwen3_moe":
            fields = {
                "num_experts": experts,
                "num_experts_per_tok": chosen,
                "moe_intermediate_size": draw(st.integers(1, 13)),
                "norm_topk_prob": switch,
                # the last layer is MoE
                "decoder_sparse_step": draw(st.sampled_from([n for n in (1, 2, 3) if layers % n == 0])),
                "mlp_only_layers": sorted(draw(st.sets(st.integers(0, layers - 2)))) if layers > 1 else [],
            }
            if family == "qwen2_moe":
                fields |= {"qkv_bias": draw(st.booleans()), "shared_expert_intermediate_size": draw(st.integers(0, 9))}
            return fields
        case "deepseek_v3" | "glm4_moe" | "dots1":
            return {**_sigmoid(draw, layers, switch), **(_latent(draw) if family == "deepseek_v3" else {})} | (
                {"use_qk_norm": draw(st.booleans()), "attention_bias": draw(st.booleans())}
                if family == "glm4_moe"
                else {}
            )
        case "longcat_flash":
            return {**_latent(draw), **_longcat(draw, experts)}
    return {}


def _latent(draw: st.DrawFn) -> Fields:
    return {
        "kv_lora_rank": draw(st.integers(1, 9)),
        "q_lora_rank": draw(st.integers(1, 9)),
        "qk_nope_head_dim": draw(st.integers(1, 7)),
        "qk_rope_head_dim": draw(st.sampled_from([2, 4, 6])),
        "v_head_dim": draw(st.integers(1, 7)),
    }


def _sigmoid(draw: st.DrawFn, layers: int, switch: bool) -> Fields:
    groups, size = draw(st.integers(1, 3)), draw(st.integers(2, 4))  # a group is scored by its best two
    used = draw(st.integers(1, groups))
    return {
        "n_routed_experts": groups * size,
        "num_experts_per_tok": draw(st.integers(1 + switch, used * size)),
        "n_group": groups,
        "topk_group": used,
        "moe_intermediate_size": draw(st.integers(1, 13)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "first_k_dense_replace": draw(st.integers(0, layers - 1)),
        "norm_topk_prob": switch,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


def _longcat(draw: st.DrawFn, experts: int) -> Fields:
    zero = draw(st.integers(1, 3))
    return {
        "num_layers": draw(st.integers(1, 2)),
        "n_routed_experts": experts,
        "zero_expert_num": zero,
        "moe_topk": draw(st.integers(2, experts + zero)),  # transformers itself fails at 1
        "expert_ffn_hidden_size": draw(st.integers(1, 13)),
        "ffn_hidden_size": draw(st.integers(1, 21)),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 6.0])),
    }
