"""Top-k on the device: the K best experts of every token and their weights, softmax or sigmoid, in one launch.

Ties go to the lower expert id. A NaN logit loses to every number, so no NaN ever makes an expert id out of range; what
comes of it is a NaN weight, and `is_nan` says so. Scores and weights are float32 whatever the logits are.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import launch

TOKENS = 8  # of one program; unmeasured
MAX_EXPERTS = 4096
SCORES = ("softmax", "sigmoid")


class TopK(NamedTuple):
    """The chosen experts, best first, and their weights."""

    expert_TK: Tensor  # int32
    weight_TK: Tensor  # float32
    has_nan_1: Tensor  # int32, 1 if any logit is NaN: read it where waiting for the device is no matter


@triton.jit
def sortable(x):
    """Return int64 keys in the order of float32 x, both zeros alike; NaN below everything."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    # negative numbers count backwards: all their bits but the sign are turned over
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(x != x, -(2**31), key)


@triton.jit(do_not_specialize=["num_tokens"])
def topk_fwd_kernel(
    logit_ptr,
    bias_ptr,
    expert_ptr,
    weight_ptr,
    nan_ptr,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """expert[t, k], weight[t, k] of the K largest scores + bias. The bias chooses, and does not weigh."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, BINS)
    slot = tl.arange(0, SLOTS)
    is_logit = (token < num_tokens)[:, None] & (expert < E)[None, :]
    place = logit_ptr + token[:, None] * E + expert[None, :]
    logit = tl.load(place, mask=is_logit, other=float("-inf")).to(tl.float32)
    if tl.sum((logit != logit).to(tl.int32)) > 0:
        tl.store(nan_ptr, 1)
    if SCORE == "softmax":
        highest = tl.max(logit, axis=1)[:, None]
        power = tl.where((expert < E)[None, :], tl.exp(logit - highest), 0.0)
        score = power / tl.sum(power, axis=1)[:, None]
    else:
        tl.static_assert(SCORE == "sigmoid")
        score = 1.0 / (1.0 + tl.exp(-logit))
    wanted = score
    if bias_ptr is not None:
        wanted = score + tl.load(bias_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)[None, :]
    elif SCORE == "softmax":
        # logits have the order of their softmax, and no two of them fall together by underflow
        wanted = logit
    # one number holds score and expert: the largest is the best score and, among equals, the lowest expert
    key = sortable(wanted) * BINS + (BINS - 1 - expert)[None, :]
    LOWEST: tl.constexpr = -(2**62)
    key = tl.where((expert < E)[None, :], key, LOWEST)
    chosen = tl.zeros((TOKENS, SLOTS), tl.int32)
    weight = tl.zeros((TOKENS, SLOTS), tl.float32)
    for k in tl.static_range(K):
        best = tl.max(key, axis=1)
        # BINS is a power of two: the low bits of the key, also of a negative one
        winner = BINS - 1 - (best & (BINS - 1)).to(tl.int32)
        is_winner = expert[None, :] == winner[:, None]
        value = tl.sum(tl.where(is_winner, score, 0.0), axis=1)
        chosen = tl.where(slot[None, :] == k, winner[:, None], chosen)
        weight = tl.where(slot[None, :] == k, value[:, None], weight)
        key = tl.where(is_winner, LOWEST, key)
    if RENORMALISE:
        weight = weight / tl.sum(weight, axis=1)[:, None]
    is_slot = (token < num_tokens)[:, None] & (slot < K)[None, :]
    place = token[:, None] * K + slot[None, :]
    tl.store(expert_ptr + place, chosen, mask=is_slot)
    tl.store(weight_ptr + place, weight * scale, mask=is_slot)


@torch.library.custom_op("moe_kernels::topk", mutates_args=())
def _topk(
    logits_TE: Tensor, bias_E: Tensor | None, k: int, score: str, renormalise: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, E = logits_TE.shape
    expert_TK = torch.empty(num_tokens, k, dtype=torch.int32, device=logits_TE.device)
    weight_TK = torch.empty(num_tokens, k, dtype=torch.float32, device=logits_TE.device)
    nan_1 = torch.zeros(1, dtype=torch.int32, device=logits_TE.device)
    if num_tokens:
        topk_fwd_kernel[(launch.cdiv(num_tokens, TOKENS),)](
            logits_TE.contiguous(), bias_E, expert_TK, weight_TK, nan_1, num_tokens, scale,
            E=E, K=k, SCORE=score, RENORMALISE=renormalise,
            TOKENS=TOKENS, BINS=triton.next_power_of_2(E), SLOTS=triton.next_power_of_2(k),
        )  # fmt: skip
    return expert_TK, weight_TK, nan_1


@_topk.register_fake
def _(logits_TE: Tensor, bias_E: Tensor | None, k: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits_TE.shape[0], k)
    expert_TK = logits_TE.new_empty(shape, dtype=torch.int32)
    return expert_TK, logits_TE.new_empty(shape, dtype=torch.float32), expert_TK.new_empty(1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits_TE, _, _, ctx.score, ctx.renormalise, ctx.scale = inputs
    expert_TK, _, nan_1 = output
    ctx.mark_non_differentiable(expert_TK, nan_1)
    ctx.save_for_backward(logits_TE, expert_TK)


def _backward(ctx: Any, _: Any, dweight_TK: Tensor, __: Any) -> tuple[Any, ...]:
    logits_TE, expert_TK = ctx.saved_tensors
    index_TK, dweight_TK = expert_TK.long(), dweight_TK * ctx.scale
    score_TE = logits_TE.float().softmax(1) if ctx.score == "softmax" else logits_TE.float().sigmoid()
    score_TK = score_TE.gather(1, index_TK)
    if ctx.renormalise:
        total_T1 = score_TK.sum(1, keepdim=True)
        dweight_TK = (dweight_TK - (dweight_TK * score_TK).sum(1, keepdim=True) / total_T1) / total_T1
    # the K experts of a token differ, so this scatter writes no place twice
    dscore_TE = torch.zeros_like(score_TE).scatter(1, index_TK, dweight_TK)
    if ctx.score == "softmax":
        dlogits_TE = score_TE * (dscore_TE - (dscore_TE * score_TE).sum(1, keepdim=True))
    else:
        dlogits_TE = dscore_TE * score_TE * (1 - score_TE)
    return dlogits_TE.to(logits_TE.dtype), None, None, None, None, None


_topk.register_autograd(_backward, setup_context=_save)


def topk(
    logits_TE: Tensor,
    k: int,
    *,
    score: str = "softmax",
    renormalise: bool = False,
    bias_E: Tensor | None = None,
    scale: float = 1.0,
) -> TopK:
    """Return the k best experts of every token, best first, and their weights; gradients flow to the logits.

    Args:
        logits_TE: any floating dtype; computed with in float32.
        score: "softmax" over all experts, or "sigmoid" of each (DeepSeek-V3, arXiv 2412.19437).
        renormalise: divide the weights of a token by their sum.
        bias_E: added to the scores for the choice alone (arXiv 2408.15664).
        scale: multiplies the weights at the end.

    Raises:
        ValueError: k is not within 1..E, there are more than 4096 experts, or the score is unknown.
    """
    E = logits_TE.shape[1]
    if not 1 <= k <= E:
        raise ValueError(f"k is {k}, but there are {E} experts; take 1 to {E}")
    if E > MAX_EXPERTS:
        raise ValueError(f"{E} experts, and a program holds at most {MAX_EXPERTS} of a token's logits; use torch.topk")
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; known are {', '.join(SCORES)}")
    return TopK(*_topk(logits_TE, bias_E, k, score, renormalise, scale))
