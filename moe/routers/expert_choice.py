"""Expert choice: every expert takes its best tokens (arXiv 2202.09368).

    p = softmax over experts;  expert e takes the c tokens with the largest p_e;  c = ceil(capacity_factor T K / E)

Every expert has the same load by construction, so no balance loss is wanted; a token may get any number of experts,
or none. The choice looks at the other tokens of the micro-batch, later ones too: it is **not causal**, so a language
model trained with it cannot be sampled as it was trained, and it depends on how a batch is split into micro-batches.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.routers import NONCAUSAL, RouterConfig, register
from moe.routers.linear import LinearRouter
from moe.routing import Assignment, RouterContext, Routing


@register("expert_choice")
@dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig(RouterConfig):
    """Expert choice router; capacity_factor 1 gives num_experts_per_tok experts to the average token."""

    is_causal: ClassVar[bool] = False
    balances_itself: ClassVar[bool] = True
    may_drop: ClassVar[bool] = False  # experts take as many as they have room for

    capacity_factor: float = 1.0
    allow_noncausal: bool = False
    """Use it in a causal model all the same."""

    def validate(self, *, num_experts: int, num_experts_per_tok: int) -> None:
        if not self.allow_noncausal:
            raise ValueError(NONCAUSAL.format(kind=self.kind, why="an expert compares a token with later ones"))
        super().validate(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        if self.capacity_factor <= 0:
            raise ValueError(f"router.capacity_factor = {self.capacity_factor} must be positive")

    def mean_experts_per_tok(self, num_experts_per_tok: int) -> float:
        return self.capacity_factor * num_experts_per_tok

    def build(self, **sizes: int) -> "ExpertChoiceRouter":
        return ExpertChoiceRouter(config=self, **sizes)


class ExpertChoiceRouter(LinearRouter):
    """Parameter `weight` [E, D]. Returns a ragged list of E * c rows, expert by expert."""

    def __init__(self, *, config: ExpertChoiceConfig, **sizes: int) -> None:
        super().__init__(config=config, **sizes)
        self.config = config

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        T, E = probs_TE.shape
        num_valid = T if context.valid_T is None else int(context.valid_T.sum())
        capacity = min(num_valid, -int(-self.config.capacity_factor * num_valid * self.num_experts_per_tok // E))
        wanted_TE = probs_TE.detach()
        if context.valid_T is not None:
            wanted_TE = wanted_TE.masked_fill(~context.valid_T.unsqueeze(1), -1.0)
        token_CE = torch.sort(wanted_TE, dim=0, descending=True, stable=True).indices[:capacity]
        expert_EC = torch.arange(E, device=x_TD.device).unsqueeze(1).expand(E, capacity)
        assignment = Assignment(
            token_N=token_CE.T.reshape(-1),
            expert_N=expert_EC.reshape(-1),
            weight_N=probs_TE.gather(0, token_CE).T.reshape(-1),
            num_experts=E,
            fan_out=None,
        )
        return Routing(assignment=assignment, logits_TE=logits_TE, probs_TE=probs_TE, valid_T=context.valid_T)
