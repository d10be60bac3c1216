"""Losses on routing, as plain functions of the statistics. One normalisation for every router: uniform load gives 1.

    f_i = share of the routed rows that expert i received, sums to 1, no gradient
    P_i = mean router probability of expert i,             sums to 1, with gradient

    load-balancing loss = E * sum_i f_i * P_i     (Switch, arXiv 2101.03961; over the global batch, arXiv 2501.11873)
    z-loss              = mean_t logsumexp(z_t)^2 (ST-MoE, arXiv 2202.08906)

The load-balancing loss may fall below 1: f and P need not be sorted alike.
"""

from torch import Tensor


def load_balancing_loss(frequency_LE: Tensor, prob_sum_LE: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Return the unweighted load-balancing loss [L], float32.

    Args:
        frequency_LE: share of the rows that each expert received over the tokens of the balance scope, float.
        prob_sum_LE: sum of router probabilities over the tokens at hand; their gradient is the gradient of the loss.
        num_tokens: what the sums are divided by. Dividing every micro-batch by the valid tokens of the whole step makes
            the values of all micro-batches and ranks add up to the loss of the global batch.
    """
    num_experts = frequency_LE.shape[-1]
    return num_experts * (frequency_LE.detach().to(prob_sum_LE.dtype) * prob_sum_LE / num_tokens).sum(-1)


def z_loss(z_sum_L: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Return the unweighted router z-loss [L], float32; `num_tokens` as for the load-balancing loss."""
    return z_sum_L / num_tokens


def frequency(tokens_per_expert_LE: Tensor) -> Tensor:
    """Return the share of rows per expert, float64 [L, E]; zeros where nothing was routed."""
    counts_LE = tokens_per_expert_LE.double()
    return counts_LE / counts_LE.sum(-1, keepdim=True).clamp_min(1)
