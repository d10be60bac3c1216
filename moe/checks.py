"""What the parts of a recipe ask of each other: checks that no part can make alone. Each raises ValueError."""

import math
from typing import Any

import torch

from moe.balance.load import BalanceConfig
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.train.optimizer import OptimizerConfig, freeze


def check_finite(values: Any, name: str = "") -> None:
    """Refuse the first number that is nan or infinite, by name: it would pass every comparison."""
    if isinstance(values, dict):
        for key, value in values.items():
            check_finite(value, f"{name}.{key}" if name else key)
    elif isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{name} = {values} must be a finite number")


def check_vocabulary(model_size: int, tokenizer_size: int) -> None:
    """Refuse a tokenizer that makes tokens for which the model has no row."""
    if tokenizer_size > model_size:
        raise ValueError(
            f"the tokenizer has {tokenizer_size} tokens but model.vocab_size = {model_size}; "
            f"set model.vocab_size to at least {tokenizer_size} (a multiple of 64 runs fastest)"
        )


def check_routing(model: ModelConfig, balance: BalanceConfig, domains: list[str]) -> None:
    """Refuse what router, balance and data do not go together in."""
    schedule, kind = model.reuse.schedule, model.router.kind
    if model.num_experts and model.router.balances_itself:
        for name in ("coefficient", "local_coefficient"):
            if getattr(balance, name):
                raise ValueError(
                    f"balance.{name} = {getattr(balance, name)}, but router kind {kind!r} makes loads even itself and "
                    "a load-balancing loss would pull its scores apart from that; set it to 0"
                )
    if schedule != "none" and balance.scope == "lagged":
        raise ValueError(
            f"balance.scope = 'lagged' counts the steps before, when other experts were open (model.reuse.schedule = "
            f"{schedule!r}); use balance.scope = 'global', or model.reuse.schedule = 'none'"
        )
    groups = balance.domain_groups
    if groups and schedule != "none":
        raise ValueError(
            f"balance.domain_groups = {groups} are taught to experts that may not be open yet (model.reuse.schedule = "
            f"{schedule!r}); leave them out, or set model.reuse.schedule = 'none'"
        )
    for name in groups:
        if name not in domains:
            raise ValueError(
                f"balance.domain_groups names {name!r}; the domains of data.sources are {', '.join(domains)}"
            )
    if groups and (not model.num_experts or any(size % len(groups) for size in model.pool_sizes)):
        raise ValueError(
            f"balance.domain_groups = {groups} are {len(groups)} groups, which do not divide num_experts = "
            f"{model.num_experts}, or what layers share of them ({sorted(set(model.pool_sizes))})"
        )


def check_trained(model: ModelConfig, optimizer: OptimizerConfig) -> None:
    """Refuse a pattern of optimizer.trainable that names nothing, and to train a router that gets no gradient."""
    is_router_trained = True
    if optimizer.trainable:
        with torch.device("meta"):
            built = Model(model, groups=ParallelGroups.single())
        freeze(built, optimizer)
        trained = [name for name, parameter in built.named_parameters() if parameter.requires_grad]
        is_router_trained = any(".router" in name for name in trained)
    if model.num_experts and is_router_trained:
        model.router.check_learns(num_experts_per_tok=model.num_experts_per_tok)
