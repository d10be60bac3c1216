"""The run that every layout must repeat: one process, one batch, plain torch, every loss written out.

Our model with the plain backend, and nothing else of ours: no engine, no micro-batches, no dispatch, no statistics.

    loss = mean cross-entropy over valid tokens + sum over layers of
           coefficient * E * sum_i f_i P_i + z_coefficient * mean logsumexp(z)^2
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.balance.load import BalanceConfig
from moe.data.tokens import Batch
from moe.initial import initialise
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routing import RouterContext
from moe.train.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a run is a function of. `batch(step, i)` returns the sequences i of a step's global batch."""

    model: ModelConfig
    optimizer: OptimizerConfig
    balance: BalanceConfig  # scope sequence or exact: those that do not depend on the layout
    dtype: torch.dtype
    seed: int
    steps: int
    sequences: int  # of a global batch
    batch: Callable[[int, Sequence[int]], Batch]
    learning_rate: Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step. Balance and z-loss are means over layers, of the whole global batch, as the log has them."""

    loss: float
    lm_loss: float
    load_balancing_loss: float
    z_loss: float
    grad_norm: float  # before clipping
    tokens_per_expert: list[list[int]]  # by layer


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a run did."""

    rows: list[Row]
    weights: dict[str, np.ndarray]  # after the last step
    choices: dict[tuple[int, int], Tensor]  # (step, layer): experts [T, K] of the global batch


def plain_loop(task: Task) -> Curve:
    """Return the run, computed in `task.dtype`."""
    model = Model(task.model, groups=ParallelGroups.single(), backend="naive").to(task.dtype).train()
    initialise(model, seed=task.seed)
    routers = {i: layer.moe.router for i, layer in enumerate(model.layers) if task.model.is_moe_layer(i)}
    adamw = plain_adamw(model, task.optimizer)
    rows, choices = [], {}
    for step in range(task.steps):
        batch = task.batch(step, range(task.sequences))
        valid_T = batch.valid_BS.flatten()
        context = RouterContext(seed=task.seed, step=step, position_T=batch.position_BS.flatten())
        logits_BSV, routings = model(batch.token_BS, valid_BS=batch.valid_BS, context=context)
        lm = F.cross_entropy(logits_BSV.flatten(0, 1)[valid_T], batch.label_BS.flatten()[valid_T])
        loss, balances, z_losses, counts = lm, [], [], []
        for (layer, router), routing in zip(routers.items(), routings, strict=True):
            z_TE = routing.logits_TE
            p_TE = torch.softmax(z_TE, -1)
            bias_E = getattr(router, "selection_bias", 0.0)
            chosen_TK = choices[step, layer] = (p_TE + bias_E).topk(task.model.num_experts_per_tok).indices
            count_TE = F.one_hot(chosen_TK, z_TE.shape[1]).sum(1) * valid_T[:, None]
            balances.append(uniform_is_one(count_TE.sum(0), p_TE[valid_T].mean(0)))
            z_losses.append(torch.logsumexp(z_TE[valid_T], -1).square().mean())
            term = sequence_term(count_TE, p_TE, batch.valid_BS) if task.balance.scope == "sequence" else balances[-1]
            loss = loss + task.balance.coefficient * term + task.balance.z_coefficient * z_losses[-1]
            counts.append(count_TE.sum(0))
        adamw.zero_grad()
        loss.backward()
        grad_norm = plain_step(adamw, max_norm=task.optimizer.max_grad_norm, learning_rate=task.learning_rate(step))
        for router, count_E in zip(routers.values(), counts, strict=True):
            plain_bias_step(router, count_E)
        rows.append(
            Row(
                loss=loss.item(),
                lm_loss=lm.item(),
                load_balancing_loss=torch.stack(balances).mean().item(),
                z_loss=torch.stack(z_losses).mean().item(),
                grad_norm=grad_norm,
                tokens_per_expert=torch.stack(counts).tolist(),
            )
        )
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return Curve(rows=rows, weights=weights, choices=choices)


def uniform_is_one(count_E: Tensor, mean_prob_E: Tensor) -> Tensor:
    """Return E * sum_i f_i P_i (arXiv 2101.03961)."""
    f_E = count_E.to(mean_prob_E.dtype) / count_E.sum()
    return count_E.numel() * (f_E * mean_prob_E).sum()


def sequence_term(count_TE: Tensor, p_TE: Tensor, valid_BS: Tensor) -> Tensor:
    """Return the loss of each sequence on its own, weighed by its share of the valid tokens."""
    terms = [
        uniform_is_one(count_SE.sum(0), p_SE[valid_S].mean(0)) * valid_S.sum()
        for count_SE, p_SE, valid_S in zip(
            count_TE.unflatten(0, valid_BS.shape), p_TE.unflatten(0, valid_BS.shape), valid_BS, strict=True
        )
        if valid_S.any()
    ]
    return torch.stack(terms).sum() / valid_BS.sum()


def plain_adamw(model: Model, settings: OptimizerConfig) -> torch.optim.AdamW:
    """Matrices decay; norms, biases and the embedding do not."""
    is_decayed = {name: p.dim() > 1 and name != "embed_tokens.weight" for name, p in model.named_parameters()}
    groups = [
        {"params": [p for name, p in model.named_parameters() if is_decayed[name] == wanted], "weight_decay": decay}
        for wanted, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def plain_step(adamw: torch.optim.AdamW, *, max_norm: float, learning_rate: float) -> float:
    """Clip by the norm over all parameters, step, and return the norm."""
    parameters = [p for group in adamw.param_groups for p in group["params"]]
    norm = sum(p.grad.double().square().sum().item() for p in parameters) ** 0.5
    for p in parameters:
        p.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
    for group in adamw.param_groups:
        group["lr"] = learning_rate
    adamw.step()
    return norm


def plain_bias_step(router: nn.Module, count_E: Tensor) -> None:
    """Move the selection bias, where there is one, against the load (arXiv 2408.15664)."""
    if hasattr(router, "selection_bias"):
        router.selection_bias += router.config.bias_update_rate * torch.sign(count_E.float().mean() - count_E)
