"""The expert implementations of others, called as a backend is, for bench_backends.

    transformers_eager, _batched_mm, _grouped_mm   Qwen3MoeExperts of transformers; seen running on a CPU
    transformers_sonicmoe                          SonicMoE (Dao-AILab/sonic-moe) as transformers loads it
    scattermoe                                     shawntan/scattermoe, scattermoe/parallel_experts.py
    liger                                          linkedin/Liger-Kernel, LigerFusedMoEFunction

Nothing below transformers_grouped_mm has ever been run from here: those three are written from their sources, and
kept to calls that stand in the projects' own modules and tests. The benchmark compares every answer with the
reference before it times it; a peer that fails or answers otherwise is named and left out. MegaBlocks is a backend.

All take SwiGLU in Hugging Face's layout, K rows per token, none of them unused.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BATCHED_LIMIT = 2**30
"""batched_mm copies the weights of its expert for every row: no more than this many bytes of copies."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be timed: sizes of the layer, dtype and device."""

    T: int
    D: int
    F: int
    E: int
    K: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Peer:
    """One implementation: `run(x_TD, index_TK, weight_TK, gate_up_E2FD, down_EDF)`, called as a backend is."""

    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    def __call__(
        self,
        x_TD: Tensor,
        token_N: Tensor,
        expert_N: Tensor,
        weight_N: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        *,
        fan_out: int | None,
        **_: Any,
    ) -> Tensor:
        assert fan_out is not None, "peers take K rows per token"
        return self.run(x_TD, expert_N.view(-1, fan_out), weight_N.view(-1, fan_out), gate_up_E2FD, down_EDF)


def transformers_experts(request: Request, implementation: str) -> Peer:
    """Return the experts of Qwen3-MoE in transformers, run by one of its implementations on the weights given."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=request.D,
        moe_intermediate_size=request.F,
        num_experts=request.E,
        num_experts_per_tok=request.K,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)

    def run(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        weights = {"gate_up_proj": gate_up_E2FD, "down_proj": down_EDF}
        return torch.func.functional_call(module, weights, (x_TD, index_TK, weight_TK))

    return Peer(run)


def refuse_batched_mm(request: Request) -> str | None:
    """Return why batched_mm is left out: its copies of the weights are too large."""
    size = request.T * request.K * 3 * request.D * request.F * request.dtype.itemsize
    if size > BATCHED_LIMIT:
        return f"its copies of the weights are {size / 2**30:.1f} GiB, limit {BATCHED_LIMIT / 2**30:.0f}"
    return None


def refuse_sonicmoe(request: Request) -> str | None:
    """Return why SonicMoE is left out: no CUDA, not bfloat16, or transformers cannot load it."""
    if request.device.type != "cuda":
        return "runs on CUDA"
    if request.dtype != torch.bfloat16:
        return "its kernels take bfloat16"
    from transformers.integrations.sonicmoe import is_sonicmoe_loadable

    return None if is_sonicmoe_loadable() else "not installed: pip install kernels nvidia-cutlass-dsl"


def scattermoe(request: Request) -> Peer:
    """Return ScatterMoE, as its GLUMLP composes it; the gates are cast to the dtype of the tokens."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear  # pyright: ignore

    def run(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        rows = flatten_sort_count(index_TK, request.E)
        h_NH = parallel_linear(x_TD, gate_up_E2FD.permute(0, 2, 1), request.K, *rows, grouped_out=True)
        gate_NF, up_NF = h_NH.chunk(2, dim=-1)
        a_NF, gates_TK = functional.silu(gate_NF) * up_NF, weight_TK.to(x_TD.dtype)
        return parallel_linear(a_NF, down_EDF.permute(0, 2, 1), 1, *rows, grouped_in=True, gates=gates_TK)

    return Peer(run)


def liger(request: Request) -> Peer:
    """Return Liger's fused MoE; its own test gives int32 ids and weights in the dtype of the tokens."""
    from liger_kernel.ops import LigerFusedMoEFunction  # pyright: ignore

    def run(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x_TD, gate_up_E2FD, down_EDF, index_TK.int(), weight_TK.to(x_TD.dtype))

    return Peer(run)


def refuse_missing(request: Request, package: str) -> str | None:
    """Return why a peer for GPUs is left out: no CUDA, or its package is not there."""
    if request.device.type != "cuda":
        return "runs on CUDA"
    return None if importlib.util.find_spec(package) else "not installed"


# by name: why it is left out, if it is, and how it is built
PEERS: dict[str, tuple[Callable[[Request], str | None], Callable[[Request], Peer]]] = {
    "transformers_eager": (lambda _: None, functools.partial(transformers_experts, implementation="eager")),
    "transformers_batched_mm": (
        refuse_batched_mm,
        functools.partial(transformers_experts, implementation="batched_mm"),
    ),
    "transformers_grouped_mm": (lambda _: None, functools.partial(transformers_experts, implementation="grouped_mm")),
    "transformers_sonicmoe": (refuse_sonicmoe, functools.partial(transformers_experts, implementation="sonicmoe")),
    "scattermoe": (functools.partial(refuse_missing, package="scattermoe"), scattermoe),
    "liger": (functools.partial(refuse_missing, package="liger_kernel"), liger),
}
