"""The expert implementations of others, called as a backend is, for bench_backends.

    transformers_eager, _batched_mm, _grouped_mm   Qwen3MoeExperts of transformers; seen running on a CPU
    transformers_sonicmoe                          SonicMoE (Dao-AILab/sonic-moe) as transformers loads it
    sonicmoe, sonicmoe_few, sonicmoe_one           SonicMoE as its package has it: sonic-moe 0.1.2.post1
    scattermoe                                     shawntan/scattermoe 0.3.0, scattermoe/parallel_experts.py
    liger                                          linkedin/Liger-Kernel 0.8.5, LigerFusedMoEFunction

Nothing below transformers_grouped_mm runs on a CPU: those adapters are written from the sources of the versions named,
and the tests hold them to what those sources say of arguments and layouts. The benchmark compares every answer with
the reference before it times it; a peer that fails or answers otherwise is named and left out. MegaBlocks is a backend.

Two peers tune themselves when they meet a layer, before anything is timed. Liger compiles and times some 250 kernels
per pair of widths (LIGER_FUSED_MOE_AUTOTUNE=0 takes one of each instead; TRITON_CACHE_AUTOTUNING=1 keeps the choices
for the next run). SonicMoE's products compile some 80 kernels in QUACK_COMPILE_WORKERS processes, once per machine,
and time them for every new shape; sonicmoe_few is the same with the choice cut down to FEW_TILES, sonicmoe_one
with the tiles that its products take where nothing is tuned.

All take SwiGLU in Hugging Face's layout, K rows per token, none of them unused; no weight is copied or laid out anew
for any of them.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BATCHED_LIMIT = 2**30
"""batched_mm copies the weights of its expert for every row: no more than this many bytes of copies."""

FEW_TILES = ((128, 192, True), (128, 128, True), (256, 128, False), (256, 192, False))
"""Tiles of SonicMoE's products on Hopper, its default first: rows, columns, and whether two groups of warps take turns
(pingpong)."""


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


def refuse_transformers_sonicmoe(request: Request) -> str | None:
    """Return why SonicMoE of transformers is left out: no CUDA, not bfloat16, or transformers cannot load it."""
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


def cut_tiles(tiles: tuple[tuple[int, int, bool], ...]) -> None:
    """Leave the tuners of SonicMoE's products only these tiles, in clusters of 2 along the rows; none means all."""
    from quack import gemm_interface  # pyright: ignore

    for tuner in (gemm_interface.gemm_tuned, gemm_interface.gemm_gated_tuned, gemm_interface.gemm_dgated_tuned):
        if not hasattr(tuner, "every_config"):
            tuner.every_config = tuner.configs
        few = []
        for entry in tuner.every_config:
            tile = entry.kwargs["config"]
            is_plain = tile.device_capacity == 9 and not tile.swap_ab and (tile.cluster_m, tile.cluster_n) == (2, 1)
            if is_plain and (tile.tile_m, tile.tile_n, tile.pingpong) in tiles:
                few.append(entry)
        tuner.configs = few if tiles else tuner.every_config
        tuner.cache.clear()  # choices made among others


def sonicmoe(request: Request, tiles: tuple[tuple[int, int, bool], ...] = ()) -> Peer:
    """Return SonicMoE behind its router: the rows sorted, then its two autograd functions.

    Both weights are views of Hugging Face's: experts last, and the gate rows before the up rows, which it calls the
    concatenated layout. Its own entry points either draw the routing from logits or allow any number of rows per
    token; with K rows for each, as its router gives, they come down to these three calls.
    """
    from sonicmoe.enums import ActivationType  # pyright: ignore
    from sonicmoe.functional import _DownProjection, _UpProjection  # pyright: ignore
    from sonicmoe.functional.triton_kernels import TC_topk_router_metadata_triton  # pyright: ignore

    cut_tiles(tiles)
    E, K, swiglu = request.E, request.K, ActivationType.SWIGLU

    def run(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        T, N = x_TD.shape[0], index_TK.numel()
        sizes = (E, E + 1, N, N, N)
        count_E, first_E1, token_N, row_N, place_N = (
            torch.empty(size, dtype=torch.int32, device=x_TD.device) for size in sizes
        )
        TC_topk_router_metadata_triton(index_TK.int(), E, count_E, first_E1, token_N, row_N, place_N)
        rows = (token_N, row_N, place_N, None, False)  # no offsets of tokens: each has K rows
        gate_up_2FDE, down_DFE = gate_up_E2FD.permute(1, 2, 0), down_EDF.permute(1, 2, 0)
        a_NF, h_NH = _UpProjection.apply(x_TD, gate_up_2FDE, None, first_E1, N, K, *rows, swiglu, False, True)
        return _DownProjection.apply(a_NF, h_NH, down_DFE, None, weight_TK, first_E1, T, K, *rows, swiglu)

    return Peer(run)


def refuse_sonicmoe(request: Request) -> str | None:
    """Return why SonicMoE's package is left out: not there, no Hopper or later, or a size or dtype it does not take."""
    reason = refuse_missing(request, "sonicmoe")
    if reason is not None:
        return reason
    if request.dtype != torch.bfloat16:
        return "its kernels take bfloat16"
    if request.D % 8 or request.F % 8:
        return "copies its tiles in pieces of 16 bytes: D and F must be multiples of 8"
    capability = torch.cuda.get_device_capability(request.device)
    return None if capability >= (9, 0) else f"runs on compute capability 9.0 and up, this is {capability}"


def refuse_sonicmoe_few(request: Request) -> str | None:
    """Return why SonicMoE with few tiles is left out: SonicMoE is, or they are not those of this card."""
    reason = refuse_sonicmoe(request)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(request.device)
    return None if capability[0] == 9 else f"its tiles are those of Hopper, this is {capability}"


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
    "transformers_sonicmoe": (
        refuse_transformers_sonicmoe,
        functools.partial(transformers_experts, implementation="sonicmoe"),
    ),
    "sonicmoe": (refuse_sonicmoe, sonicmoe),
    "sonicmoe_few": (refuse_sonicmoe_few, functools.partial(sonicmoe, tiles=FEW_TILES)),
    "sonicmoe_one": (refuse_sonicmoe_few, functools.partial(sonicmoe, tiles=FEW_TILES[:1])),
    "scattermoe": (functools.partial(refuse_missing, package="scattermoe"), scattermoe),
    "liger": (functools.partial(refuse_missing, package="liger_kernel"), liger),
}


@contextlib.contextmanager
def compiling_in_parallel(device: torch.device) -> Iterator[None]:
    """Compile what Triton's tuner is about to try on all cores inside the block, where it would go one by one.

    What is tried, timed and chosen stays the same. It reaches into Triton where 3.6 and 3.7 are alike; if that fails,
    kernels are compiled one by one as ever.
    """
    if device.type != "cuda":
        yield
        return
    from triton.runtime import _async_compile
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def prune_and_compile(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        if len(configs) < 2 or kwargs.get("warmup"):
            return configs
        arguments, options = tuple(self.nargs.values()), {**kwargs, "warmup": True}
        with contextlib.suppress(Exception), ThreadPoolExecutor(os.cpu_count()) as executor:
            try:
                with _async_compile.AsyncCompileMode(executor):
                    for config in configs:
                        self.fn.run(*arguments, **options, **config.all_kwargs())
            finally:
                _async_compile.active_mode.set(None)
        return configs

    Autotuner.prune_configs = prune_and_compile
    try:
        yield
    finally:
        Autotuner.prune_configs = prune
