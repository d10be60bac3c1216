"""Zero-computation experts: choices that cost nothing, so that tokens differ in how much they compute.

LongCat-Flash (arXiv 2509.01322) with identity experts; MoE++ (arXiv 2410.07348) with zero, copy and constant ones.
N experts and Z zero-computation experts share one softmax:

    R = softmax(z) over N + Z,   chosen S = top-k of R + b,   g = R * routed_scaling_factor, not normalised
    y = sum over i in S, i < N of g_i E_i(x)  +  (sum of g over chosen identity experts) x  +  constants' part

A zero-computation expert is never dispatched: identity experts give the token back to itself, zero experts nothing, a
constant expert a1 x + a2 v with (a1, a2) = softmax(W_c x) and a learned v. Padding gets none of it.

The bias b holds the mean number of real experts at `target_experts_per_tok` (K_e) and evens their loads, from the
counts of the global batch; it is 0 for the zero-computation experts, which take what is left:

    error_i = K_e / (K N) - T_i / (K T)        T_i tokens of expert i, T all tokens
    proportional   b_i += rate * error_i        (LongCat calls it a PID controller; what it publishes is this)
    sign           b_i += rate * sign(error_i)  (arXiv 2408.15664)
    pid            b_i += rate * error_i + kp * (e - e') + kd * (e - 2 e' + e'')
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moe.routers import RouterConfig, register
from moe.routers.linear import LinearRouter, sorted_by_score
from moe.routing import RouterContext, Routing


@register("zero_experts")
@dataclass(frozen=True, kw_only=True)
class ZeroExpertsConfig(RouterConfig):
    """Router over real and zero-computation experts; model.num_experts_per_tok is K, of both kinds together."""

    may_drop: ClassVar[bool] = False  # how many rows run is what its bias holds
    only_for_training: ClassVar[tuple[str, ...]] = (
        "target_experts_per_tok",
        "bias_update_rule",
        "bias_update_rate",
        "proportional_gain",
        "derivative_gain",
        "device_loss_coefficient",
        "num_device_groups",
    )
    num_identity_experts: int = 4
    num_zero_experts: int = 0
    num_constant_experts: int = 0
    target_experts_per_tok: float = 0.0
    """K_e, the mean number of real experts per token; 0 leaves the bias at 0."""
    bias_update_rule: Literal["proportional", "sign", "pid"] = "proportional"
    bias_update_rate: float = 0.1
    proportional_gain: float = 0.0
    derivative_gain: float = 0.0
    routed_scaling_factor: float = 1.0
    device_loss_coefficient: float = 0.0
    """Of LongCat's loss over groups of experts; its loads are those of one micro-batch, so it depends on the split."""
    num_device_groups: int = 1

    @property
    def num_free_experts(self) -> int:
        """Zero-computation experts of all kinds."""
        return self.num_identity_experts + self.num_zero_experts + self.num_constant_experts

    def validate(self, *, num_experts: int, num_experts_per_tok: int) -> None:
        kinds = ("num_identity_experts", "num_zero_experts", "num_constant_experts")
        for name in (*kinds, "bias_update_rate", "proportional_gain", "derivative_gain", "device_loss_coefficient"):
            if getattr(self, name) < 0:
                raise ValueError(f"router.{name} = {getattr(self, name)} must not be negative")
        total = num_experts + self.num_free_experts
        if not 1 <= num_experts_per_tok <= total:
            raise ValueError(
                f"num_experts_per_tok = {num_experts_per_tok} must lie in 1..{total}, the real and the "
                f"zero-computation experts together"
            )
        most = min(num_experts_per_tok, num_experts)
        if not 0 <= self.target_experts_per_tok <= most:
            raise ValueError(
                f"router.target_experts_per_tok = {self.target_experts_per_tok} must lie in 0..{most}: a token chooses "
                f"{num_experts_per_tok} of {num_experts} real experts at most"
            )
        if num_experts_per_tok - self.num_free_experts > self.target_experts_per_tok > 0:
            raise ValueError(
                f"router.target_experts_per_tok = {self.target_experts_per_tok} cannot be reached: with "
                f"{self.num_free_experts} zero-computation experts, a token always has "
                f"{num_experts_per_tok - self.num_free_experts} real ones"
            )
        if self.routed_scaling_factor <= 0:
            raise ValueError(f"router.routed_scaling_factor = {self.routed_scaling_factor} must be positive")
        if self.num_device_groups < 1 or num_experts % self.num_device_groups:
            raise ValueError(f"router.num_device_groups = {self.num_device_groups} does not divide {num_experts}")
        if self.device_loss_coefficient and not 0 < self.target_experts_per_tok < num_experts_per_tok:
            raise ValueError("router.device_loss_coefficient needs 0 < target_experts_per_tok < num_experts_per_tok")

    def mean_experts_per_tok(self, num_experts_per_tok: int) -> float:
        return self.target_experts_per_tok or num_experts_per_tok

    def build(self, **sizes: int) -> "ZeroExpertsRouter":
        return ZeroExpertsRouter(config=self, **sizes)


class ZeroExpertsRouter(LinearRouter):
    """Parameter `weight` [N + Z, D], rows in the order real, identity, zero, constant.

    With constant experts also `constant_weight` [C, 2, D] and `constant_value` [C, D]. Buffer `selection_bias`
    float32 [N + Z]; for the rule pid `errors` [2, N], of the two steps before.
    """

    selection_bias: Tensor
    errors: Tensor

    def __init__(self, *, config: ZeroExpertsConfig, num_experts: int, **sizes: int) -> None:
        num_scores = num_experts + config.num_free_experts
        super().__init__(config=config, num_experts=num_experts, num_scores=num_scores, **sizes)
        self.config = config
        self.register_state("selection_bias", torch.zeros(num_scores))
        if config.bias_update_rule == "pid":
            self.register_state("errors", torch.zeros(2, num_experts))
        if config.num_constant_experts:
            self.constant_weight = nn.Parameter(torch.empty(config.num_constant_experts, 2, self.weight.shape[1]))
            self.constant_value = nn.Parameter(torch.empty(config.num_constant_experts, self.weight.shape[1]))

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        config, N = self.config, self.num_candidates
        all_logits_TS = self.logits(x_TD)
        score_TS = torch.softmax(all_logits_TS, dim=-1)
        choice_TK = sorted_by_score(score_TS + self.selection_bias)[:, : self.num_experts_per_tok]
        weight_TK = score_TS.gather(1, choice_TK) * config.routed_scaling_factor
        assignment = self.assign(choice_TK, weight_TK, context, is_used_TK=choice_TK < N)
        if context.valid_T is not None:
            weight_TK = weight_TK.masked_fill(~context.valid_T.unsqueeze(1), 0.0)
        first_zero = N + config.num_identity_experts
        is_identity_TK = (choice_TK >= N) & (choice_TK < first_zero)
        return Routing(
            assignment=assignment,
            logits_TE=all_logits_TS,
            # balance is among the real experts; how many choices go to the others is the bias's business
            probs_TE=torch.softmax(all_logits_TS[:, :N], dim=-1),
            valid_T=context.valid_T,
            identity_weight_T=weight_TK.where(is_identity_TK, 0.0).sum(-1),
            added_TD=self._constants(x_TD, choice_TK - first_zero - config.num_zero_experts, weight_TK),
            loss_sum=self._device_loss(score_TS, choice_TK, context),
        )

    def _constants(self, x_TD: Tensor, constant_TK: Tensor, weight_TK: Tensor) -> Tensor | None:
        """Return what the constant experts add to each token; constant_TK is negative for all other choices."""
        if not self.config.num_constant_experts:
            return None
        wide_TD = x_TD.to(weight_TK.dtype)
        count = self.config.num_constant_experts
        weight_TC = weight_TK.new_zeros(x_TD.shape[0], count + 1).scatter_add(
            1, constant_TK.clamp_min(-1) + 1, weight_TK.where(constant_TK >= 0, 0.0)
        )[:, 1:]
        mix_TC2 = torch.einsum("td,cmd->tcm", wide_TD, self.constant_weight.to(wide_TD.dtype)).softmax(-1)
        own_T1 = (weight_TC * mix_TC2[..., 0]).sum(1, keepdim=True)
        return own_T1 * wide_TD + (weight_TC * mix_TC2[..., 1]) @ self.constant_value.to(wide_TD.dtype)

    def _device_loss(self, score_TS: Tensor, choice_TK: Tensor, context: RouterContext) -> Tensor | None:
        """Return coefficient * T * sum over groups of f_j P_j: the groups are devices, and all free experts together.

        f_j is 1 for every group where K_e real experts per token are spread evenly.
        """
        config, N, K = self.config, self.num_candidates, self.num_experts_per_tok
        if not config.device_loss_coefficient:
            return None
        if context.valid_T is not None:
            valid_T1 = context.valid_T.unsqueeze(1)
            score_TS = torch.where(valid_T1, score_TS, 0.0)
            choice_TK = choice_TK[context.valid_T]
        groups = config.num_device_groups
        count_S = torch.bincount(choice_TK.flatten(), minlength=score_TS.shape[1]).to(score_TS.dtype)
        num_tokens = max(choice_TK.shape[0], 1)
        target = config.target_experts_per_tok
        load_J = torch.cat(
            (
                count_S[:N].view(groups, -1).sum(1) * groups / (target * num_tokens),
                count_S[N:].sum(0, keepdim=True) / ((K - target) * num_tokens),
            )
        )
        total_S = score_TS.sum(0)
        share_J = torch.cat((total_S[:N].view(groups, -1).sum(1), total_S[N:].sum(0, keepdim=True)))
        return config.device_loss_coefficient * (load_J * share_J).sum()

    @torch.no_grad()
    def end_step(self, tokens_per_expert_E: Tensor, context: RouterContext, *, num_tokens: int) -> None:
        config, N, K = self.config, self.num_candidates, self.num_experts_per_tok
        if not config.target_experts_per_tok:
            return
        load_E = tokens_per_expert_E.to(device=self.selection_bias.device, dtype=torch.float32) / (K * num_tokens)
        error_E = config.target_experts_per_tok / (K * N) - load_E
        if config.bias_update_rule == "sign":
            change_E = config.bias_update_rate * torch.sign(error_E)
        else:
            change_E = config.bias_update_rate * error_E
        if config.bias_update_rule == "pid":
            before_E, earlier_E = self.errors.clone()
            change_E += config.proportional_gain * (error_E - before_E)
            change_E += config.derivative_gain * (error_E - 2 * before_E + earlier_E)
            self.errors.copy_(torch.stack((error_E, before_E)))
        self.selection_bias[:N] += change_E
