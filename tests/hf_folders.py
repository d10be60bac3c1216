"""Folders that transformers itself wrote: small models of every family, trained a little; and what becomes of them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moe.checkpoint import CheckpointReader, load_weights, read_model_config
from moe.convert.families import Family
from moe.convert.hf import export_hf
from moe.convert.names import FAMILIES
from moe.model import Model
from moe.parallel.groups import ParallelGroups

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 9, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
SIGMOID = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "intermediate_size": 20,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 3,
    "topk_group": 2,
}
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 20},
    "mistral": {"intermediate_size": 20, "sliding_window": 5},
    "qwen2": {"intermediate_size": 20},
    "qwen3": {"intermediate_size": 20, "head_dim": 8},
    "mixtral": {"intermediate_size": 10, "num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 10, "num_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {**MOE, "intermediate_size": 20, "shared_expert_intermediate_size": 14, "mlp_only_layers": [1]},
    "qwen3_moe": {**MOE, "intermediate_size": 20, "head_dim": 8, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "deepseek_v3": {**SIGMOID, **LATENT, "num_key_value_heads": 4},
    "glm4_moe": {
        **SIGMOID,
        "head_dim": 8,
        "use_qk_norm": True,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
    },
    "dots1": {**SIGMOID, "head_dim": 8},
    "gpt_oss": {
        "intermediate_size": 10,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 5,
    },
    "longcat_flash": {
        **LATENT,
        "num_key_value_heads": 4,
        "num_layers": 2,
        "head_dim": 4,
        "n_routed_experts": 6,
        "zero_expert_num": 3,
        "moe_topk": 4,
        "expert_ffn_hidden_size": 10,
        "ffn_hidden_size": 20,
    },
}
assert set(FIELDS) == set(FAMILIES), "every family is tested"


def make_model(family: str, *, steps: int = 20, seed: int = 0, **changes: Any):
    """A model of transformers after a few steps on counting sequences, its selection biases moved off zero."""
    fields = {**SMALL, **FIELDS[family], **changes}
    if family == "longcat_flash":
        del fields["num_hidden_layers"]
    torch.manual_seed(seed)
    config = FAMILIES[family].config(**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        start = torch.randint(config.vocab_size, (8, 1))
        token = (start + torch.arange(16) * torch.randint(1, 4, (8, 1))) % config.vocab_size
        loss = model(input_ids=token, labels=token).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("e_score_correction_bias", "sinks")):
                tensor.add_(0.05 * torch.randn_like(tensor))
    return model.eval()


def save(
    model, folder: Path, *, shard: str = "5GB", dtype: torch.dtype = torch.float32, is_fused: bool = False
) -> Path:
    """Write the model as its users do; `is_fused` with the experts of a layer in one tensor."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard, save_original_format=not is_fused)
    return folder


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model in plain transformers, float32, and which keys it found."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )


def reader_of(folder: Path) -> CheckpointReader:
    """Return the weights in a model folder of ours."""
    return CheckpointReader.open(folder / "checkpoints/step_00000000")


def model_of(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """Return the model in a model folder of ours."""
    model = Model(read_model_config(folder), groups=ParallelGroups.single()).to(dtype)
    load_weights(model, reader_of(folder))
    return model.eval()


def export(folder: Path, out: Path, **arguments: Any) -> Family:
    """Export a model folder of ours."""
    return export_hf(read_model_config(folder), reader_of(folder), out, tokenizer_dir=folder / "tokenizer", **arguments)
