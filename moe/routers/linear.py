"""LinearRouter: what routers that score experts by one linear map share.

    logits z = W x (+ b), in float32 (float64 for a float64 model)

Parameter `weight` [number of scores, D]. State that steps in thousandths (selection bias, thresholds of controllers)
is registered as float32 state: it follows the module to a device, never to another dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.routers import Router, RouterConfig
from moe.routing import Assignment, RouterContext


class LinearRouter(Router):
    """Base of routers with one row of weights per score.

    Args:
        config: of the router, validated here against the sizes.
        num_experts: experts a token may choose among.
        num_scores: rows of `weight`; more than num_experts where zero-computation experts are scored too.
    """

    def __init__(
        self,
        *,
        config: RouterConfig,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        layer_index: int,
        num_scores: int = 0,
    ) -> None:
        super().__init__()
        config.validate(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        self.num_candidates = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.layer_index = layer_index
        self.weight = nn.Parameter(torch.empty(num_scores or num_experts, hidden_size))
        self.bias: nn.Parameter | None = None  # [scores], of kinds that have one
        self._float32_state: list[str] = []

    def register_state(self, name: str, value: Tensor) -> None:
        """Register a buffer that stays float32 and is part of checkpoints."""
        self.register_buffer(name, value.to(torch.float32))
        self._float32_state.append(name)

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in self._float32_state}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            moved = getattr(self, name)
            after = torch.empty_like(moved, dtype=torch.float32) if before.is_meta else before.to(device=moved.device)
            setattr(self, name, after)
        return self

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the raw logits [T, scores], float32; float64 for float64 tokens, so that layouts can be compared."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TS = F.linear(x_TD.to(wide), self.weight.to(wide))
        return logits_TS if self.bias is None else logits_TS + self.bias.to(wide)

    def assign(
        self, expert_TK: Tensor, weight_TK: Tensor, context: RouterContext, *, is_used_TK: Tensor | None = None
    ) -> Assignment:
        """Return rows t*K..t*K+K-1 for token t; padding and places not used keep their rows, but no expert sees them.

        Args:
            expert_TK: int64, all different in a row where used.
            is_used_TK: bool; None means every place.
        """
        if context.valid_T is not None:
            valid_T1 = context.valid_T.unsqueeze(1)
            is_used_TK = valid_T1.expand_as(expert_TK) if is_used_TK is None else is_used_TK & valid_T1
        if is_used_TK is not None:
            expert_TK = expert_TK.masked_fill(~is_used_TK, self.num_candidates)
            weight_TK = weight_TK.masked_fill(~is_used_TK, 0.0)
        T, K = expert_TK.shape
        token_TK = torch.arange(T, device=expert_TK.device).unsqueeze(1).expand(T, K)
        return Assignment(
            token_N=token_TK.reshape(-1),
            expert_N=expert_TK.reshape(-1),
            weight_N=weight_TK.reshape(-1),
            num_experts=self.num_candidates,
            fan_out=K,
        )


def sorted_by_score(score_TE: Tensor) -> Tensor:
    """Return expert ids [T, E], best first; ties go to the lower id. No gradient flows here."""
    return torch.sort(score_TE.detach(), dim=-1, descending=True, stable=True).indices
