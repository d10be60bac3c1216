"""Hash routing: a token's id alone decides its experts (Hash Layers, arXiv 2106.04426).

Each of the K experts of a token id is a pseudo-random function of (seed, id), the same in every layer or not; nothing
is learned, and the weights are 1 / K. A baseline that a learned router has to beat.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.routers import Router, RouterConfig, noise, register
from moe.routers.linear import sorted_by_score
from moe.routing import Assignment, RouterContext, Routing


@register("hash")
@dataclass(frozen=True, kw_only=True)
class HashConfig(RouterConfig):
    """Hash router."""

    hash_seed: int = 0
    differs_by_layer: bool = True

    def build(self, *, hidden_size: int, num_experts: int, num_experts_per_tok: int, layer_index: int) -> "HashRouter":
        self.validate(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        key = (self.hash_seed, layer_index if self.differs_by_layer else 0)
        return HashRouter(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok, key=key)


class HashRouter(Router):
    """No parameters. Its logits are zeros: the balance loss sees uniform probabilities and has no gradient."""

    def __init__(self, *, num_experts: int, num_experts_per_tok: int, key: tuple[int, ...]) -> None:
        super().__init__()
        self.num_candidates = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self._key = key

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        if context.token_T is None:
            raise ValueError("the hash router needs context.token_T, the id of each token; Model fills it in")
        E, K = self.num_candidates, self.num_experts_per_tok
        # K different experts: the first K of a random order of all of them
        expert_TK = sorted_by_score(noise.uniform(context.token_T, E, key=self._key))[:, :K]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weight_TK = torch.full(expert_TK.shape, 1.0 / K, dtype=wide, device=x_TD.device)
        if context.valid_T is not None:
            expert_TK = expert_TK.masked_fill(~context.valid_T.unsqueeze(1), E)
        T = x_TD.shape[0]
        logits_TE = torch.zeros(T, E, dtype=wide, device=x_TD.device)
        assignment = Assignment(
            token_N=torch.arange(T, device=x_TD.device).repeat_interleave(K),
            expert_N=expert_TK.reshape(-1),
            weight_N=weight_TK.reshape(-1),
            num_experts=E,
            fan_out=K,
        )
        probs_TE = torch.full_like(logits_TE, 1.0 / E)
        return Routing(assignment=assignment, logits_TE=logits_TE, probs_TE=probs_TE, valid_T=context.valid_T)
