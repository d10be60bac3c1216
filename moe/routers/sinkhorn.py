"""Sinkhorn: while training, top-k of a plan that loads all experts alike (S-BASE, Clark et al., arXiv 2202.01169).

    cost = exp(z),  d0 and d1 scale its rows and columns in turn until rows sum to 1/T and columns to 1/E
    chosen = top-k of d0 * cost * d1;   weight = softmax(z), of sigmoid(z) where K = 1, not normalised

In evaluation the plain top-k of the logits is taken: the plan needs the whole micro-batch, later tokens included, so
the training choice is **not causal** and depends on how a batch is split. Balance comes from the plan; no balance loss.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.routers import NONCAUSAL, RouterConfig, register
from moe.routers.linear import LinearRouter, sorted_by_score
from moe.routing import RouterContext, Routing


@register("sinkhorn")
@dataclass(frozen=True, kw_only=True)
class SinkhornConfig(RouterConfig):
    """Sinkhorn router."""

    is_causal: ClassVar[bool] = False
    balances_itself: ClassVar[bool] = True

    max_iterations: int = 100
    tolerance: float = 1e-4
    allow_noncausal: bool = False
    """Use it in a causal model all the same: its evaluation is causal, its training is not."""

    def validate(self, *, num_experts: int, num_experts_per_tok: int) -> None:
        if not self.allow_noncausal:
            raise ValueError(NONCAUSAL.format(kind=self.kind, why="while training, its plan weighs later tokens too"))
        super().validate(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        if self.max_iterations < 1 or self.tolerance <= 0:
            raise ValueError(
                f"router.max_iterations = {self.max_iterations} must be at least 1 and router.tolerance = "
                f"{self.tolerance} positive"
            )

    def build(self, **sizes: int) -> "SinkhornRouter":
        return SinkhornRouter(config=self, **sizes)


@torch.no_grad()
def transport_plan(logits_TE: Tensor, *, max_iterations: int, tolerance: float) -> Tensor:
    """Return the plan [T, E]: rows sum to 1/T, columns to 1/E once it has converged.

    The largest logit of a row is taken off first: it cancels in the row's scale, and exp cannot overflow.
    """
    T, E = logits_TE.shape
    cost_TE = (logits_TE - logits_TE.amax(1, keepdim=True)).exp()
    scale_E = torch.ones(E, dtype=cost_TE.dtype, device=cost_TE.device)
    scale_T = torch.ones(T, dtype=cost_TE.dtype, device=cost_TE.device)
    for _ in range(max_iterations):
        scale_T = 1 / (T * (cost_TE @ scale_E))
        before_E, scale_E = scale_E, 1 / (E * (cost_TE.T @ scale_T))
        if (scale_E - before_E).abs().mean() < tolerance * scale_E.abs().mean():
            break
    return scale_T.unsqueeze(1) * cost_TE * scale_E


class SinkhornRouter(LinearRouter):
    """Parameter `weight` [E, D]."""

    def __init__(self, *, config: SinkhornConfig, **sizes: int) -> None:
        super().__init__(config=config, **sizes)
        self.config = config

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        score_TE = torch.sigmoid(logits_TE) if self.num_experts_per_tok == 1 else probs_TE
        expert_TK = sorted_by_score(self._wanted(logits_TE, context))[:, : self.num_experts_per_tok]
        assignment = self.assign(expert_TK, score_TE.gather(1, expert_TK), context)
        return Routing(assignment=assignment, logits_TE=logits_TE, probs_TE=probs_TE, valid_T=context.valid_T)

    def _wanted(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        valid_T = context.valid_T
        if not self.training or not logits_TE.shape[0]:
            return logits_TE
        limits = {"max_iterations": self.config.max_iterations, "tolerance": self.config.tolerance}
        if valid_T is None:
            return transport_plan(logits_TE.detach(), **limits)
        wanted_TE = logits_TE.detach().clone()
        wanted_TE[valid_T] = transport_plan(wanted_TE[valid_T], **limits)
        return wanted_TE
