"""Dynamic confidence: as many experts as it takes for their probability mass to pass a threshold.

"Harder Tasks Need More Experts" (arXiv 2403.07652, ACL 2024). With p = softmax(z), sorted in descending order:

    chosen  = the smallest set of best experts with mass > threshold      the one that passes it is included
    weight  = p of the chosen, not normalised: a token's output shrinks with its confidence, as in the paper

A confident token runs one expert, a doubtful one several, and compute follows the count. At the start every token is
doubtful: uniform p with 16 experts and threshold 0.4 take 7 of them, four times what the paper's model takes in the
end. `max_k` bounds it, `warmup_steps` lets the threshold grow from 0. The paper adds an entropy loss
(balance.entropy_coefficient, 1e-4 there), without which the router buys compute by being diffuse.

With `target_experts_per_tok` a PI controller moves the threshold so that the mean over the global batch holds that
number (the idea of DTop-p, arXiv 2512.13996; the formula here is ours):

    e = (target - mean) / target,   I = I + e,   threshold = clip(threshold_0 + Kp e + Ki I, 0, 1)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.routers import RouterConfig, register
from moe.routers.linear import LinearRouter, sorted_by_score
from moe.routing import RouterContext, Routing

PROPORTIONAL, INTEGRAL = (
    0.05,
    0.02,
)  # gains of the controller: 1 % off at most after 48 to 104 steps (E 8 and 16, random logits)


@register("dynamic_confidence")
@dataclass(frozen=True, kw_only=True)
class DynamicConfidenceConfig(RouterConfig):
    """Dynamic confidence router. Plans take model.num_experts_per_tok, or the target, for the mean."""

    threshold: float = 0.4
    min_k: int = 1
    max_k: int | None = None
    """At most so many experts per token; None allows all. On GPUs memory is held for max_k rows per token."""
    norm_topk_prob: bool = False
    warmup_steps: int = 0
    """The threshold rises from 0 over so many optimizer steps."""
    target_experts_per_tok: float = 0.0
    """Hold this mean number of experts by moving the threshold; 0 leaves the threshold alone."""

    def validate(self, *, num_experts: int, num_experts_per_tok: int) -> None:
        super().validate(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        if self.threshold < 0:
            raise ValueError(f"router.threshold = {self.threshold} must not be negative; 0 chooses min_k experts")
        most = num_experts if self.max_k is None else self.max_k
        if not 1 <= self.min_k <= most <= num_experts:
            raise ValueError(
                f"router.min_k = {self.min_k} and router.max_k = {self.max_k} must satisfy "
                f"1 <= min_k <= max_k <= num_experts = {num_experts}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"router.warmup_steps = {self.warmup_steps} must not be negative")
        if self.target_experts_per_tok and not self.min_k <= self.target_experts_per_tok <= most:
            raise ValueError(
                f"router.target_experts_per_tok = {self.target_experts_per_tok} must lie in "
                f"min_k..max_k = {self.min_k}..{most}, or be 0"
            )
        if self.target_experts_per_tok and self.warmup_steps:
            raise ValueError("router.warmup_steps and router.target_experts_per_tok both move the threshold; set one")

    def check_learns(self, *, num_experts_per_tok: int) -> None:
        if self.norm_topk_prob and self.max_k == 1:
            raise ValueError(
                "router.max_k = 1 with norm_topk_prob makes every weight 1, so the router gets no gradient from the "
                "language-model loss; set router.norm_topk_prob to False"
            )

    def mean_experts_per_tok(self, num_experts_per_tok: int) -> float:
        return self.target_experts_per_tok or num_experts_per_tok

    def build(self, **sizes: int) -> "DynamicConfidenceRouter":
        return DynamicConfidenceRouter(config=self, **sizes)


class DynamicConfidenceRouter(LinearRouter):
    """Parameter `weight` [E, D]; with a target, float32 buffers `threshold` and `error_sum` (scalars)."""

    threshold: Tensor
    error_sum: Tensor

    def __init__(self, *, config: DynamicConfidenceConfig, **sizes: int) -> None:
        super().__init__(config=config, **sizes)
        self.config = config
        self.max_k = self.num_candidates if config.max_k is None else config.max_k
        if config.target_experts_per_tok:
            self.register_state("threshold", torch.tensor(config.threshold))
            self.register_state("error_sum", torch.tensor(0.0))

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        expert_TK = sorted_by_score(probs_TE)[:, : self.max_k]
        weight_TK = probs_TE.gather(1, expert_TK)
        is_used_TK = self._within(weight_TK.detach(), self._threshold(context))
        if self.config.norm_topk_prob:
            weight_TK = weight_TK / weight_TK.where(is_used_TK, 0.0).sum(-1, keepdim=True)
        assignment = self.assign(expert_TK, weight_TK, context, is_used_TK=is_used_TK)
        return Routing(assignment=assignment, logits_TE=logits_TE, probs_TE=probs_TE, valid_T=context.valid_T)

    def _threshold(self, context: RouterContext) -> Tensor | float:
        config = self.config
        if config.target_experts_per_tok:
            return self.threshold
        if self.training and context.step < config.warmup_steps:
            return config.threshold * context.step / config.warmup_steps
        return config.threshold

    def _within(self, weight_TK: Tensor, threshold: Tensor | float) -> Tensor:
        """Return which places of a token, best first, are used: those before which the mass has not passed."""
        # an exclusive prefix by shifting: subtracting from the inclusive one would round differently
        before_TK = torch.nn.functional.pad(weight_TK.cumsum(-1)[:, :-1], (1, 0))
        is_used_TK = before_TK <= threshold
        is_used_TK[:, : self.config.min_k] = True
        return is_used_TK

    @torch.no_grad()
    def end_step(self, tokens_per_expert_E: Tensor, context: RouterContext, *, num_tokens: int) -> None:
        target = self.config.target_experts_per_tok
        if target:
            error = (target - tokens_per_expert_E.sum().item() / num_tokens) / target
            self.error_sum += error
            moved = self.config.threshold + PROPORTIONAL * error + INTEGRAL * self.error_sum
            self.threshold.copy_(moved.clamp(0.0, 1.0))
            # a threshold at its end stops the sum there, or it would take as long to come back
            self.error_sum.copy_(self.error_sum.clamp(-self.config.threshold / INTEGRAL, 1.0 / INTEGRAL))
