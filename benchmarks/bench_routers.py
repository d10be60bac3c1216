"""What a router costs: alone, and in a training step, beside top-k; and whether a step's cost follows its experts.

    python benchmarks/bench_routers.py                            # every router, then a sweep of the mean count
    python benchmarks/bench_routers.py --machine cpu_2core_epyc   # and adds rows to results/routers_cpu_2core_epyc.csv

Each registered router on the same two-layer model (width 512, 64 experts of width 256, K = 8) and the same 1,024
tokens. Contenders take turns within a round, one thread, time on the core; medians over the rounds. Alone is the
router of one layer, forward and backward, which does not move between the rounds; a step is forward, losses on
routing and backward. No optimizer: its cost is that of the parameters, the same for all.

The sweep holds everything but the threshold of dynamic confidence and counts what ran: matrix FLOPs as torch counts
them, in the experts alone and in the whole step.
"""

import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from result_rows import append_rows, current_commit
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.statistics import collect
from moe.initial import initialise
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routers import ROUTERS, RouterConfig
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.topk import TopKConfig
from moe.routing import RouterContext
from moe.train.loss import language_model_loss, micro_batch_loss

RESULTS = Path(__file__).parent / "results"
VOCABULARY, SEQUENCES, LENGTH = 1024, 4, 256
# fields that a kind needs to be what it is for; the rest stand at their defaults
FORMS: dict[str, dict[str, Any]] = {
    "zero_experts": {"num_identity_experts": 32},
    "dynamic_confidence": {"threshold": 0.2, "max_k": 16},
}
THRESHOLDS = (0.0, 0.04, 0.1, 0.2, 0.4, 0.6)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender. Times are medians, in milliseconds of one thread on the core."""

    date: str
    commit: str
    torch: str
    contender: str
    experts_per_token: float
    alone_ms: float  # router of one layer, forward and backward
    step_ms: float
    step_to_topk: float
    expert_gflop: float  # of a step, three matrix products forward and six backward per row
    step_gflop: float  # of a step, all matrix products that torch counted


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One model, and how long its steps took."""

    model: Model
    step_ms: list[float] = dataclasses.field(default_factory=list)
    alone_ms: list[float] = dataclasses.field(default_factory=list)


def make_model(router: RouterConfig) -> Model:
    """Return a two-layer model with initial weights that spread the logits, as a trained router's are."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
        router=router,
    )
    model = Model(config, groups=ParallelGroups.single())
    initialise(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.mul_(3.0)
    return model


def step(model: Model, token_BS: Tensor) -> float:
    """Run forward, losses and backward; return the mean number of experts of a token."""
    position_T = torch.arange(SEQUENCES * LENGTH)
    logits_BSV, routings = model(token_BS[:, :-1], context=RouterContext(position_T=position_T))
    label_BS = token_BS[:, 1:]
    statistics_ = collect(routings)
    terms = micro_batch_loss(
        lm_sum=language_model_loss(logits_BSV, label_BS, torch.ones_like(label_BS, dtype=torch.bool)),
        statistics=statistics_,
        load=GlobalLoad(scope="micro", group=None),
        balance=BalanceConfig(scope="micro"),
        num_tokens=label_BS.numel(),
    )
    terms.total.backward()
    model.zero_grad()
    return statistics_.tokens_per_expert_LE.sum().item() / len(routings) / label_BS.numel()


def route(model: Model, x_TD: Tensor, token_T: Tensor) -> None:
    """Run the router of the first layer, forward and backward."""
    router = model.layers[0].moe.router
    context = RouterContext(position_T=torch.arange(len(x_TD)), token_T=token_T)
    routing = router(x_TD.requires_grad_(), context)
    total = routing.assignment.weight_N.sum() + routing.probs_TE.square().sum()
    if total.requires_grad:  # a hash has nothing to learn
        total.backward()
    model.zero_grad()


def timed(function: Callable[[], object]) -> float:
    """Return milliseconds of this thread on the core."""
    start = time.thread_time()
    function()
    return 1e3 * (time.thread_time() - start)


def measure(routers: dict[str, RouterConfig], rounds: int) -> list[Row]:
    """Return a row per router; contenders take turns in every round."""
    draw = torch.Generator().manual_seed(0)
    token_BS = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=draw)
    x_TD = torch.randn(SEQUENCES * LENGTH, 512, generator=draw)
    token_T = token_BS[:, :-1].flatten()
    contenders = {name: Contender(model=make_model(router).train()) for name, router in routers.items()}
    experts, flops = {}, {}
    for name, contender in contenders.items():  # the first run also warms up
        with FlopCounterMode(display=False) as counter:
            experts[name] = step(contender.model, token_BS)
        flops[name] = counter.get_total_flops()
    for _ in range(rounds):
        for contender in contenders.values():
            contender.step_ms.append(timed(lambda model=contender.model: step(model, token_BS)))
            contender.alone_ms.append(timed(lambda model=contender.model: route(model, x_TD, token_T)))
    reference = statistics.median(next(iter(contenders.values())).step_ms)
    rows = []
    for name, contender in contenders.items():
        config = contender.model.config
        per_row = 18 * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
        rows.append(
            Row(
                date=datetime.date.today().isoformat(),
                commit=current_commit(),
                torch=torch.__version__,
                contender=name,
                experts_per_token=round(experts[name], 3),
                alone_ms=round(statistics.median(contender.alone_ms), 3),
                step_ms=round(statistics.median(contender.step_ms), 2),
                step_to_topk=round(statistics.median(contender.step_ms) / reference, 3),
                expert_gflop=round(per_row * experts[name] * token_T.numel() / 1e9, 3),
                step_gflop=round(flops[name] / 1e9, 3),
            )
        )
    return rows


def all_routers() -> dict[str, RouterConfig]:
    """Return a configuration of every registered kind, top-k first."""
    routers: dict[str, RouterConfig] = {"topk": TopKConfig()}
    for kind in ROUTERS:
        allow = {field.name: True for field in fields(ROUTERS[kind]) if field.name == "allow_noncausal"}
        routers.setdefault(kind, ROUTERS[kind](**allow, **FORMS.get(kind, {})))
    return routers


def main(rounds: int = 15, machine: str = "") -> None:
    """Measure, print, and add rows to results/routers_<machine>.csv if a machine is named."""
    torch.set_num_threads(1)
    base = DynamicConfidenceConfig(threshold=0.0)
    sweep = {f"dynamic_confidence {t}": replace(base, threshold=t) for t in THRESHOLDS}
    rows = measure(all_routers(), rounds) + measure({"topk": TopKConfig(), **sweep}, rounds)[1:]
    names = [field.name for field in fields(Row)][3:]
    table = Table(*(name.replace("_", " ") for name in names), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(getattr(row, name)) for name in names))
    Console(width=120).print(table)
    if machine:
        append_rows(RESULTS / f"routers_{machine}.csv", rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
