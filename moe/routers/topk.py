"""Top-k routing as the published models use it.

    logits z = W x (float32)        score p = softmax(z) or sigmoid(z)        choice: top k of p + b (b: selection bias)

    softmax before top-k             w = p[chosen]                 Switch (2101.03961), OLMoE (2409.02060)
      ... and normalised             w = p[chosen] / sum           Mixtral (2401.04088), Qwen3-MoE (2505.09388)
    softmax after top-k              w = softmax(z[chosen])        GPT-OSS
    sigmoid with bias, in groups     w = s[chosen] / sum * scale   DeepSeek-V3 (2412.19437)

Ties go to the lower expert id.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.routers import RouterConfig, noise, register
from moe.routers.bias import updated_bias
from moe.routers.linear import LinearRouter, sorted_by_score
from moe.routing import RouterContext, Routing


@register("topk")
@dataclass(frozen=True, kw_only=True)
class TopKConfig(RouterConfig):
    """Top-k router. Field names as in Hugging Face configurations where they have one."""

    only_for_training: ClassVar[tuple[str, ...]] = ("bias_update_rate", "router_jitter_noise")

    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    softmax_after_topk: bool = False  # weights are a softmax over the chosen logits
    norm_topk_prob: bool = False  # weights of a token sum to one
    routed_scaling_factor: float = 1.0
    n_group: int = 1  # groups of experts; a token chooses among the topk_group best groups
    topk_group: int = 1
    use_router_bias: bool = False  # z = W x + b with a learned b, which weighs and chooses (GPT-OSS)
    use_selection_bias: bool = False
    bias_update_rate: float = 1e-3
    router_jitter_noise: float = 0.0  # router input times U(1 - eps, 1 + eps) while training; the experts see x itself

    def validate(self, *, num_experts: int, num_experts_per_tok: int) -> None:
        super().validate(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        E, K = num_experts, num_experts_per_tok
        if self.n_group < 1 or E % self.n_group:
            raise ValueError(f"router.n_group = {self.n_group} does not divide num_experts = {E}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"router.topk_group = {self.topk_group} must lie in 1..n_group = {self.n_group}")
        group_size = E // self.n_group
        if self.n_group > 1 and group_size < 2:
            raise ValueError(
                f"router.n_group = {self.n_group} leaves {group_size} expert a group; at least 2 are needed"
            )
        if K > self.topk_group * group_size:
            raise ValueError(
                f"num_experts_per_tok = {K} exceeds the {self.topk_group * group_size} experts of "
                f"router.topk_group = {self.topk_group} groups; raise topk_group or lower n_group"
            )
        if self.softmax_after_topk and self.scoring_func != "softmax":
            raise ValueError("router.softmax_after_topk needs router.scoring_func = 'softmax'")
        if self.routed_scaling_factor <= 0:
            raise ValueError(f"router.routed_scaling_factor = {self.routed_scaling_factor} must be positive")
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(f"router.router_jitter_noise = {self.router_jitter_noise} must lie in [0, 1)")
        if self.bias_update_rate < 0:
            raise ValueError(f"router.bias_update_rate = {self.bias_update_rate} must not be negative")

    def check_learns(self, *, num_experts_per_tok: int) -> None:
        if num_experts_per_tok == 1 and (self.norm_topk_prob or self.softmax_after_topk):
            raise ValueError(
                "num_experts_per_tok = 1 with normalised weights makes every weight 1, so the router gets no gradient "
                "from the language-model loss; set router.norm_topk_prob and router.softmax_after_topk to False, or "
                "leave a router that was fitted out of optimizer.trainable"
            )

    def check_can_close_experts(self) -> None:
        for name, is_used in (("n_group", self.n_group > 1), ("use_selection_bias", self.use_selection_bias)):
            if is_used:
                raise ValueError(
                    f"router.{name} = {getattr(self, name)} does not go with a growing pool: groups may be closed, and "
                    "closed experts would gather bias; leave it out, or set model.reuse.schedule = 'none'"
                )

    def build(self, **sizes: int) -> "TopKRouter":
        return TopKRouter(config=self, **sizes)


class TopKRouter(LinearRouter):
    """Linear router with K experts per token. Parameters `weight` [E, D] and, if asked for, `bias` [E]; buffer
    `selection_bias` float32 [E]."""

    selection_bias: Tensor

    def __init__(self, *, config: TopKConfig, **sizes: int) -> None:
        super().__init__(config=config, **sizes)
        self.config = config
        if config.use_router_bias:
            self.bias = nn.Parameter(torch.empty(self.num_candidates))
        if config.use_selection_bias:
            self.register_state("selection_bias", torch.zeros(self.num_candidates))

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        logits_TE = self.logits(self._noised(x_TD, context))
        open_E = context.open_E
        if open_E is None:
            probs_TE, score_TE = self._scores(logits_TE)
        else:
            open_TE = logits_TE.masked_fill(~open_E, float("-inf"))
            probs_TE, score_TE = self._scores(open_TE)  # probs are those of open experts and sum to one in any case
            if context.use_zero_score:
                score_TE = self._scores(logits_TE)[1]
            else:
                logits_TE = open_TE
        expert_TK = self._choose(score_TE if open_E is None else score_TE.masked_fill(~open_E, float("-inf")))
        return Routing(
            assignment=self.assign(expert_TK, self._weights(logits_TE, score_TE, expert_TK), context),
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            valid_T=context.valid_T,
            active_E=open_E,
        )

    @torch.no_grad()
    def end_step(self, tokens_per_expert_E: Tensor, context: RouterContext, *, num_tokens: int) -> None:
        if self.config.use_selection_bias:
            new = updated_bias(self.selection_bias, tokens_per_expert_E, rate=self.config.bias_update_rate)
            self.selection_bias.copy_(new)

    def _noised(self, x_TD: Tensor, context: RouterContext) -> Tensor:
        eps = self.config.router_jitter_noise
        if not eps or not self.training:
            return x_TD
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        if context.position_T is None:
            raise ValueError("router_jitter_noise needs context.position_T, the global index of each token")
        key = (context.seed, context.step, self.layer_index, context.round)
        return x_TD * (1 - eps + 2 * eps * noise.uniform(context.position_T, x_TD.shape[1], key=key))

    def _scores(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return (probs, scores): probs sum to one and feed the balance loss, scores rank and weigh the experts."""
        if self.config.scoring_func == "softmax":
            probs_TE = torch.softmax(logits_TE, dim=-1)
            return probs_TE, probs_TE
        # sigmoid(z) / sum without an epsilon: sums to one also where every sigmoid underflows
        return torch.softmax(F.logsigmoid(logits_TE), dim=-1), torch.sigmoid(logits_TE)

    @torch.no_grad()
    def _choose(self, score_TE: Tensor) -> Tensor:
        """Return the chosen experts [T, K], best first, all different."""
        choice_TE = score_TE
        if self.config.use_selection_bias:
            choice_TE = choice_TE + self.selection_bias
        if self.config.n_group > 1:
            choice_TE = self._keep_best_groups(choice_TE)
        # a NaN ranks highest in topk and sort alike; the skipped-step check sees the loss, the indices stay in range
        return sorted_by_score(choice_TE)[:, : self.num_experts_per_tok].contiguous()

    def _keep_best_groups(self, choice_TE: Tensor) -> Tensor:
        config = self.config
        choice_TGe = choice_TE.unflatten(1, (config.n_group, -1))
        if config.use_selection_bias:
            group_score_TG = choice_TGe.topk(2, dim=-1).values.sum(-1)  # DeepSeek-V3
        else:
            group_score_TG = choice_TGe.amax(-1)  # DeepSeek-V2 (2405.04434)
        order_TG = torch.sort(group_score_TG, dim=-1, descending=True, stable=True).indices
        is_kept_TG = torch.zeros_like(group_score_TG, dtype=torch.bool)
        is_kept_TG.scatter_(1, order_TG[:, : config.topk_group], True)
        # -inf, not 0: with a negative bias a masked 0 would beat a kept expert
        return choice_TGe.masked_fill(~is_kept_TG.unsqueeze(-1), float("-inf")).flatten(1)

    def _weights(self, logits_TE: Tensor, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
        config = self.config
        if config.softmax_after_topk:
            weight_TK = torch.softmax(logits_TE.gather(1, expert_TK), dim=-1)
        elif config.norm_topk_prob and config.scoring_func == "sigmoid":
            # as for probs: no epsilon, no 0/0
            weight_TK = torch.softmax(F.logsigmoid(logits_TE.gather(1, expert_TK)), dim=-1)
        else:
            weight_TK = score_TE.gather(1, expert_TK)
            if config.norm_topk_prob:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return weight_TK * config.routed_scaling_factor
