"""Capacity: at most so many rows per expert, the rest dropped. Off by default; every kernel here is dropless.

    capacity = max(minimum, ceil(factor * T * K / E))         T valid tokens of this rank's micro-batch

A dropped row contributes nothing; the residual stream carries its token on. Which rows an expert keeps:

    position    those of the first tokens, each token's choices in order (Switch, arXiv 2101.03961)
    choice      every token's first choice before any second one (GShard, arXiv 2006.16668; Flaxformer)
    probs       those with the largest weights (DeepSpeed, Megatron)

Only `position` is causal: by the others, whether an early token keeps its expert depends on later ones. All of them
depend on how the batch is split, since a capacity is that of one rank's micro-batch.
The load-balancing loss and the selection bias see what was chosen, before anything is dropped.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe.routing import Assignment, Routing, count_ids

POLICIES = ("position", "choice", "probs")


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """How many rows an expert takes, and which."""

    __pydantic_config__ = {"extra": "forbid"}

    factor: float = 0.0
    """Of the mean load, while training; 0 drops nothing."""
    eval_factor: float = 2.0
    """The same in evaluation and sampling; 0 drops nothing there."""
    minimum: int = 4
    policy: Literal["position", "choice", "probs"] = "position"
    renormalises: bool = False
    """Scale the weights a token keeps to the sum of those it chose (DeepSpeed); else its output shrinks (Megatron)."""
    allow_noncausal: bool = False

    def validate(self, *, num_experts_per_tok: int) -> None:
        """Raise ValueError for a value out of range, or a policy that lets a causal model see the future."""
        for name in ("factor", "eval_factor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"model.capacity.{name} = {getattr(self, name)} must be finite and not negative")
        if self.minimum < 0:
            raise ValueError(f"model.capacity.minimum = {self.minimum} must not be negative")
        if self.policy not in POLICIES:
            raise ValueError(f"model.capacity.policy = {self.policy!r} must be one of {', '.join(POLICIES)}")
        is_causal = self.policy == "position" or (self.policy == "choice" and num_experts_per_tok == 1)
        if self.factor and not is_causal and not self.allow_noncausal:
            raise ValueError(
                f"model.capacity.policy = {self.policy!r} is not causal: whether a token keeps its expert depends on "
                "later tokens, so a language model trained with it sees the future; use 'position', or say "
                "model.capacity.allow_noncausal = True"
            )

    def factor_while(self, *, is_training: bool) -> float:
        """Return the factor that holds, 0 where nothing is dropped."""
        return self.factor if is_training or not self.factor else self.eval_factor


def drop(routing: Routing, capacity: CapacityConfig, *, experts_per_tok: float, is_training: bool) -> Routing:
    """Return the routing with `kept` filled: the rows that experts have room for. Its assignment stays as chosen.

    Args:
        experts_per_tok: rows of the average token, as far as the configuration says; a measured mean would let a
            token see the choices of later ones.
    """
    factor = capacity.factor_while(is_training=is_training)
    if not factor:
        return routing
    chosen = routing.assignment
    T = routing.probs_TE.shape[0]
    num_tokens = torch.tensor(T, device=chosen.expert_N.device) if routing.valid_T is None else routing.valid_T.sum()
    mean = num_tokens.double() * (factor * experts_per_tok / chosen.num_experts)
    room = mean.ceil().long().clamp_min(capacity.minimum)  # stays on its device: no host synchronisation
    is_kept_N = _places(chosen, capacity.policy) < room
    is_kept_N = _places(chosen, capacity.policy) < room.to(chosen.expert_N.device)
    weight_N = torch.where(is_kept_N, chosen.weight_N, 0.0)
    if capacity.renormalises:
        chosen_T = weight_N.new_zeros(T).index_add(0, chosen.token_N, chosen.weight_N)
        kept_T = weight_N.new_zeros(T).index_add(0, chosen.token_N, weight_N)
        # a token that lost every row keeps none, and 0 / 0 must not reach the gradient
        scale_T = chosen_T / torch.where(kept_T > 0, kept_T, 1.0)
        weight_N = weight_N * scale_T[chosen.token_N]
    expert_N = torch.where(is_kept_N, chosen.expert_N, chosen.num_experts)
    return replace(routing, kept=replace(chosen, expert_N=expert_N, weight_N=weight_N))


@torch.no_grad()
def _places(assignment: Assignment, policy: str) -> Tensor:
    """Return the place of each row in the queue of its expert, int64 [N]."""
    expert_N = assignment.expert_N
    N = expert_N.shape[0]
    rows_N = torch.arange(N, device=expert_N.device)
    if policy == "probs":
        # unused rows have weight 0 and a queue of their own
        order_N = torch.sort(assignment.weight_N.detach(), descending=True, stable=True).indices
    elif policy == "choice" and assignment.fan_out:
        order_N = rows_N.view(-1, assignment.fan_out).t().reshape(-1)
    else:
        order_N = torch.sort(assignment.token_N, stable=True).indices
    sorted_N, by_expert_N = torch.sort(expert_N[order_N], stable=True)
    counts_E = count_ids(expert_N, assignment.num_experts + 1)
    first_E = counts_E.cumsum(0) - counts_E
    place_N = torch.empty_like(rows_N)
    place_N[order_N[by_expert_N]] = rows_N - first_E[sorted_N]
    return place_N
