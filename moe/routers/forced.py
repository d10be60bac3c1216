"""Forced routing, for measuring: loads as even as can be, or as skewed as asked, whatever the scores say.

The weights are those of a softmax top-k router for the experts it is given, so gradients and costs are real; only the
choice is not. Never for training a model one means to keep.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.routers import RouterConfig, noise, register
from moe.routers.linear import LinearRouter, sorted_by_score
from moe.routing import RouterContext, Routing


@register("forced")
@dataclass(frozen=True, kw_only=True)
class ForcedConfig(RouterConfig):
    """Forced router."""

    load: Literal["balanced", "skewed"] = "balanced"
    """balanced: experts in turn, by the token's position in the step. skewed: `skew` of all tokens choose expert 0
    first, the rest at random."""
    skew: float = 0.5

    def validate(self, *, num_experts: int, num_experts_per_tok: int) -> None:
        super().validate(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        if not 0 <= self.skew <= 1:
            raise ValueError(f"router.skew = {self.skew} must lie in [0, 1]")

    def build(self, **sizes: int) -> "ForcedRouter":
        return ForcedRouter(config=self, **sizes)


class ForcedRouter(LinearRouter):
    """Parameter `weight` [E, D], which weighs experts and does not choose them."""

    def __init__(self, *, config: ForcedConfig, **sizes: int) -> None:
        super().__init__(config=config, **sizes)
        self.config = config

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        position_T = context.position_T
        if position_T is None:
            position_T = torch.arange(x_TD.shape[0], device=x_TD.device)
        expert_TK = self._experts(position_T, context)
        assignment = self.assign(expert_TK, probs_TE.gather(1, expert_TK), context)
        return Routing(assignment=assignment, logits_TE=logits_TE, probs_TE=probs_TE, valid_T=context.valid_T)

    def _experts(self, position_T: Tensor, context: RouterContext) -> Tensor:
        E, K = self.num_candidates, self.num_experts_per_tok
        if self.config.load == "balanced":
            return (position_T.unsqueeze(1) * K + torch.arange(K, device=position_T.device)) % E
        key = (context.seed, context.step, self.layer_index, context.round)
        draw_TE = noise.uniform(position_T, E + 1, key=key)
        # above every other draw, so expert 0 comes first for this share of the tokens
        is_first_T = draw_TE[:, E] < self.config.skew
        score_TE = draw_TE[:, :E].clone()
        score_TE[:, 0] = torch.where(is_first_T, 2.0, score_TE[:, 0])
        return sorted_by_score(score_TE)[:, :K]
