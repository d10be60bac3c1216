"""Memory of one rank, from parameter counts. States are exact up to padding; activations are an estimate.

Per parameter, in bytes, before sharding:

    dtype   weight   gradient   master   moments
    fp32       4         4         4        8      stage 1 and 2 keep a float32 copy of their share beside the weight
    bf16       2       2 + 4       4        8      gradients accumulate in float32

ZeRO 1 splits masters and moments, ZeRO 2 the float32 gradients as well: dense parameters over all ranks, experts over
the ranks that hold copies of them.
"""

from dataclasses import dataclass

from moe.counts import count_parameters, flops_per_token
from moe.data.batching import BatchConfig
from moe.model import ModelConfig
from moe.parallel.groups import ParallelConfig

_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int  # float32 masters and AdamW moments
    activations: int  # estimate: the peak of one micro-batch, balanced routing

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def plan_memory(model: ModelConfig, batch: BatchConfig, parallel: ParallelConfig, *, world_size: int) -> MemoryPlan:
    """Return the memory of one of `world_size` ranks."""
    count = count_parameters(model)
    experts = count.experts // parallel.ep_size
    dense = count.total - count.experts
    local = dense + experts
    width = 2 if parallel.dtype == "bf16" else 4
    stage = parallel.stage_on(world_size)
    # stage 0 updates the weights in place and keeps no masters
    share = local if stage == 0 else dense // world_size + experts // (world_size // parallel.ep_size)
    accumulated = 4 * (share if stage == 2 else local) if parallel.dtype == "bf16" else 0
    return MemoryPlan(
        weights=width * local,
        gradients=width * local + accumulated,
        optimizer=(8 if stage == 0 else 12) * share,
        activations=_activations(model, batch, parallel, width),
    )


def _activations(model: ModelConfig, batch: BatchConfig, parallel: ParallelConfig, width: int) -> int:
    tokens = batch.micro_sequences * batch.sequence_length
    D = model.hidden_size
    query = model.num_attention_heads * (model.query_dim + model.value_dim)
    key_value = model.num_key_value_heads * (model.query_dim + model.value_dim)
    key_value += model.q_lora_rank + model.kv_lora_rank  # latents
    attention = 3 * D + query + key_value
    # the expert kernels keep their input and the pre-activation of gate and up, nothing else
    routed = D + round(model.expert_spec.halves * model.moe_intermediate_size * model.mean_experts_per_tok)
    shared = 4 * model.shared_expert_intermediate_size
    rounds = model.chain.rounds
    num_moe = len(model.moe_layers)
    if parallel.activation_checkpointing:
        # each half of a block keeps its input, a chain that of every round
        kept = model.num_attention_layers * 3 * D + num_moe * (rounds - 1) * D
        per_token = kept + max(attention, routed + shared, 4 * model.intermediate_size)
    else:
        per_token = (
            model.num_attention_layers * (attention + 2 * D)
            + num_moe * (rounds * routed + model.chain.num_shared_runs * shared)
            + model.num_dense_layers * (D + 4 * model.intermediate_size)
        )
    # logits in the model's dtype, their float32 copy and its gradient
    return tokens * (width * per_token + (width + 8) * model.vocab_size)


def plan_text(
    *,
    model: ModelConfig,
    batch: BatchConfig,
    parallel: ParallelConfig,
    steps: int,
    world_size: int,
) -> str:
    """Return the plan of a recipe as text."""
    count = count_parameters(model)
    memory = plan_memory(model, batch, parallel, world_size=world_size)
    tokens = steps * batch.tokens
    forward = flops_per_token(model, batch.sequence_length)
    in_rounds = f" in each of {model.chain.rounds} rounds" if model.chain.rounds > 1 else ""
    shared_by = f" each, pools over {model.reuse.group_size} layers" if model.reuse.group_size > 1 else ""
    times = 4 if parallel.activation_checkpointing else 3
    rows = [
        ("parameters", f"{count.total:,} total, {count.active:,} active per token"),
        (
            "experts",
            f"{len(model.moe_layers)} of {model.num_hidden_layers} layers, {model.num_experts} experts{shared_by}, "
            f"{model.mean_experts_per_tok:g} per token{in_rounds}; {count.experts:,} parameters",
        ),
        (
            "ranks",
            f"{world_size}, expert parallel {parallel.ep_size}, ZeRO {parallel.stage_on(world_size)}, {parallel.dtype}",
        ),
        (
            "batch",
            f"{batch.global_sequences} sequences of {batch.sequence_length} = {batch.tokens:,} tokens; "
            f"{batch.accumulation(world_size)} micro-batches of {batch.micro_sequences} on each rank",
        ),
        ("tokens", f"{tokens:,} in {steps:,} steps ({tokens / count.active:.1f} per active parameter)"),
        ("compute", f"{forward * times * tokens:.3g} floating-point operations, {forward:,} per token forward"),
        ("memory", f"{memory.total / _GIB:.2f} GiB on each rank"),
        (
            "",
            f"weights {memory.weights / _GIB:.2f}, gradients {memory.gradients / _GIB:.2f}, "
            f"optimizer {memory.optimizer / _GIB:.2f}, activations about {memory.activations / _GIB:.2f}",
        ),
    ]
    return "\n".join(f"{name:<11} {value}" for name, value in rows)
