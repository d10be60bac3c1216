"""How hard the load-balancing loss pulls at the routers, beside the language-model loss.

    ratio of a layer = ||d(coefficient * load-balancing loss) / d logits|| / ||d(language-model loss) / d logits||

LongCat-Flash (arXiv 2509.01322) keeps it below 0.1; above 1, balance decides where tokens go. Both gradients are over
all tokens of the global batch. That of the language model is what reaches the logits through the experts' weights, so
it costs no backward pass of its own; losses of deeper layers on routing, which come the same way, are in it.
"""

import math

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moe.balance.statistics import RouterStatistics
from moe.routing import Routing


class RouterGradients:
    """Sums of squares over the micro-batches of a step, one of each kind per routing.

    Args:
        loss_scale: what the loss is multiplied by before its backward pass.
    """

    def __init__(self, *, loss_scale: float) -> None:
        self._loss_scale = loss_scale
        self._balance_L: Tensor | None = None
        self._lm_L: Tensor | None = None
        self._pending: list[list[Tensor]] = []  # gradients at the logits of each routing, from all paths

    def watch(self, routings: list[Routing], statistics: RouterStatistics, balance: Tensor) -> None:
        """Prepare for the backward pass of this micro-batch.

        Args:
            balance: scalar with gradient, the weighted load-balancing loss of all routings.
        """
        grad_BLE = torch.zeros_like(statistics.prob_sum_BLE)
        if statistics.prob_sum_BLE.requires_grad:  # not where nothing is learned
            (grad_BLE,) = torch.autograd.grad(balance, statistics.prob_sum_BLE, retain_graph=True)
        squares = [_balance_square(routing, grad_BLE[:, i]) for i, routing in enumerate(routings)]
        square_L = torch.stack(squares)
        self._balance_L = square_L if self._balance_L is None else self._balance_L + square_L
        self._pending = [_caught(routing) for routing in routings]

    def finish(self) -> None:
        """Take in what the backward pass brought."""
        squares = []
        for caught in self._pending:
            total = sum(caught[1:], start=caught[0]) if caught else torch.zeros(())
            squares.append((total / self._loss_scale).double().square().sum())
        assert self._balance_L is not None
        square_L = torch.stack([square.to(self._balance_L.device) for square in squares])
        self._lm_L = square_L if self._lm_L is None else self._lm_L + square_L
        self._pending = []

    def squares(self) -> Tensor:
        """Return float64 [2, L]: of the balance loss, of the language-model loss. Sums over ranks are sums of these."""
        assert self._balance_L is not None and self._lm_L is not None
        return torch.stack((self._balance_L, self._lm_L))


def mean_ratio(squares_2L: Tensor) -> float:
    """Return the mean over the routings with a gradient from the language model; nan if there is none."""
    balance_L, lm_L = squares_2L.sqrt()
    ratio_L = (balance_L / lm_L)[lm_L > 0]
    return ratio_L.mean().item() if ratio_L.numel() else math.nan


def _balance_square(routing: Routing, grad_BE: Tensor) -> Tensor:
    """Return the squared norm of the balance loss's gradient at the logits; grad_BE is that at the sums of probs."""
    probs_TE = routing.probs_TE
    nothing = torch.zeros((), dtype=torch.float64, device=probs_TE.device)
    if not (probs_TE.requires_grad and routing.logits_TE.requires_grad):
        return nothing
    B, (T, E) = grad_BE.shape[0], probs_TE.shape
    scale = 1.0
    if routing.active_E is not None or grad_BE.shape[1] > E:
        # collect() scales the sums of a layer with fewer experts than the widest, or some of them closed
        num_active = E if routing.active_E is None else routing.active_E.sum()
        scale = num_active / grad_BE.shape[1]
    grad_TE = (scale * grad_BE[:, :E]).repeat_interleave(T // B, dim=0)
    if routing.valid_T is not None:
        grad_TE = torch.where(routing.valid_T.unsqueeze(1), grad_TE, 0.0)
    (grad,) = torch.autograd.grad(
        probs_TE, routing.logits_TE, grad_TE.to(probs_TE.dtype), retain_graph=True, allow_unused=True
    )
    return nothing if grad is None else grad.double().square().sum()


def _caught(routing: Routing) -> list[Tensor]:
    """Return a list that the coming backward pass fills: gradients at the logits, one per path through the weights."""
    caught: list[Tensor] = []
    logits_TE = routing.logits_TE
    for tensor in (routing.assignment.weight_N, routing.identity_weight_T, routing.added_TD):
        if tensor is None or not tensor.requires_grad or not logits_TE.requires_grad:
            continue

        handles: list[RemovableHandle] = []

        def hook(grad: Tensor, tensor: Tensor = tensor, handles: list[RemovableHandle] = handles) -> None:
            handles[0].remove()  # or the pass below would call it again, without end
            # within the backward pass: the few nodes from here to the logits have not run, so they can run twice
            (at_logits,) = torch.autograd.grad(tensor, logits_TE, grad, retain_graph=True, allow_unused=True)
            if at_logits is not None:
                caught.append(at_logits)

        handles.append(tensor.register_hook(hook))
    return caught
