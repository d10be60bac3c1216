"""ReMoE: experts whose logit is positive, weighted by it (arXiv 2412.14711).

    w = relu(z),   chosen = {w > 0},   y = sum of w_i E_i(x)          no top-k, so y is continuous in the router

Nothing bounds the number of chosen experts but an L1 loss whose coefficient follows the measured sparsity: after every
optimizer step  coefficient *= 1.2 where more than num_experts_per_tok are chosen on average, else /= 1.2. The paper
keeps one coefficient for all layers; here each layer keeps its own, from its own counts. A symmetric start chooses half
of all experts, E / 2K times the aim, for the first hundred steps or so.

The balance loss reads w divided by its sum. A token may choose no expert at all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.routers import RouterConfig, register
from moe.routers.linear import LinearRouter, sorted_by_score
from moe.routing import RouterContext, Routing


@register("relu")
@dataclass(frozen=True, kw_only=True)
class ReLUConfig(RouterConfig):
    """ReLU router; model.num_experts_per_tok is the mean number of experts the coefficient aims at."""

    initial_coefficient: float = 1e-8
    update_factor: float = 1.2

    def validate(self, *, num_experts: int, num_experts_per_tok: int) -> None:
        super().validate(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        if self.initial_coefficient <= 0:
            raise ValueError(f"router.initial_coefficient = {self.initial_coefficient} must be positive")
        if self.update_factor <= 1:
            raise ValueError(f"router.update_factor = {self.update_factor} must be above 1")

    def build(self, **sizes: int) -> "ReLURouter":
        return ReLURouter(config=self, **sizes)


class ReLURouter(LinearRouter):
    """Parameter `weight` [E, D]; float32 buffer `coefficient` (scalar), of the L1 loss."""

    coefficient: Tensor

    def __init__(self, *, config: ReLUConfig, **sizes: int) -> None:
        super().__init__(config=config, **sizes)
        self.config = config
        self.register_state("coefficient", torch.tensor(config.initial_coefficient))

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        weight_TE = torch.relu(logits_TE)
        total_T1 = weight_TE.sum(-1, keepdim=True)
        even = 1.0 / self.num_candidates
        probs_TE = torch.where(total_T1 > 0, weight_TE / total_T1.where(total_T1 > 0, 1.0), even)
        expert_TE = sorted_by_score(weight_TE)
        sorted_TE = weight_TE.gather(1, expert_TE)
        assignment = self.assign(expert_TE, sorted_TE, context, is_used_TK=sorted_TE.detach() > 0)
        size_T = total_T1.squeeze(1)
        if context.valid_T is not None:
            size_T = torch.where(context.valid_T, size_T, 0.0)
        return Routing(
            assignment=assignment,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            valid_T=context.valid_T,
            loss_sum=self.coefficient.to(size_T.dtype) * size_T.sum(),
        )

    @torch.no_grad()
    def end_step(self, tokens_per_expert_E: Tensor, context: RouterContext, *, num_tokens: int) -> None:
        mean = tokens_per_expert_E.sum().item() / num_tokens
        factor = self.config.update_factor
        self.coefficient *= factor if mean > self.num_experts_per_tok else 1 / factor
