"""Do two rounds of two experts beat one round of four? Chain of experts (arXiv 2506.18945) on two dependent look-ups.

    python benchmarks/papers/chain.py                              # 12 variants x 3 seeds, one core
    python benchmarks/papers/chain.py --steps 50 --seeds 0 --no-record

The task: 16 random tables f_1..f_16 over 32 symbols. Input emb(i) + emb(j) + emb(x), target f_i(f_j(x)): the second
look-up needs the answer of the first, which is what a second round could add. 8,192 questions, an eighth of them held
out: who composes answers those too, who memorises does not. One MoE layer between embeddings and head, no attention;
chance is log 32 = 3.47 nats. 500 steps of 512 questions.

    MoE K/E          one round of K of E experts; its residual is that of `delta`, a usual block
    CoE-2 K/E        two rounds of K: the compute of MoE 2K/E, which moe.counts.match_compute states

`release` is the residual of the authors' code, which also makes a single round another block than the usual one: it has
its own MoE row. K = E are the dense controls. The paper's pairs and figures stand in docs/results.md beside ours.
"""

import dataclasses
import datetime
import statistics
import time

import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from pictures import curves
from rich.console import Console
from study import IMAGES, RESULTS, append_rows, current_commit, read, show
from torch import Tensor, nn
from toy import Point, Trace

from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.statistics import collect
from moe.blocks.chain import ChainConfig, run_chain
from moe.counts import ExpertCompute, count_parameters, match_compute
from moe.initial import initialise
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routers.topk import TopKConfig
from moe.routing import RouterContext, Routing
from moe.train.loss import micro_batch_loss
from moe.train.optimizer import parameter_groups
from moe.train.schedule import ScheduleConfig

TABLES, SYMBOLS, HELD_OUT = 16, 32, 8  # one question of 8 is held out
WIDTH, EXPERT_WIDTH, BATCH = 64, 16, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A layer: K of E experts, in so many rounds."""

    num_experts_per_tok: int
    num_experts: int = 16
    chain: ChainConfig = dataclasses.field(default_factory=ChainConfig)


def rounds(residual: str = "delta", *, has_shared_router: bool = False) -> ChainConfig:
    """Return two rounds."""
    return ChainConfig(rounds=2, residual=residual, has_shared_router=has_shared_router)


VARIANTS = {
    "MoE 4/16": Variant(num_experts_per_tok=4),
    "CoE-2 2/16": Variant(num_experts_per_tok=2, chain=rounds()),
    "CoE-2 shared router": Variant(num_experts_per_tok=2, chain=rounds(has_shared_router=True)),
    "MoE release": Variant(num_experts_per_tok=4, chain=ChainConfig(residual="release")),
    "CoE-2 release": Variant(num_experts_per_tok=2, chain=rounds("release")),
    "CoE-2 release, shared r.": Variant(num_experts_per_tok=2, chain=rounds("release", has_shared_router=True)),
    "CoE-2 outer": Variant(num_experts_per_tok=2, chain=rounds("outer")),
    "CoE-2 init": Variant(num_experts_per_tok=2, chain=rounds("init")),
    "MoE 8/16": Variant(num_experts_per_tok=8),
    "CoE-2 4/16": Variant(num_experts_per_tok=4, chain=rounds()),
    "dense 4/4": Variant(num_experts_per_tok=4, num_experts=4),
    "dense CoE-2 4/4": Variant(num_experts_per_tok=4, num_experts=4, chain=rounds()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to run. The study is what the defaults say."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 500
    record: bool = True
    """Append rows to benchmarks/results and draw docs/images/chain.png."""
    resume: bool = False
    """Take runs of as many steps from the CSV files where they have them, and train only the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One run. Losses in nats; both over all questions of their kind, after the last step."""

    date: str
    commit: str
    torch: str
    steps: int
    variant: str
    seed: int
    loss: float  # of the questions trained on
    loss_held_out: float
    accuracy: float
    accuracy_held_out: float
    expert_runs: float  # per question, as match_compute counts them
    expert_flops: int
    parameters_experts: int
    load_violation: float  # max / mean - 1 of a round's counts, mean over rounds, over the questions trained on
    step_ms: float  # median, time on the core


class Lookup(nn.Module):
    """Embeddings, the MoE half of a block, norm, head."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        model = Model(config, groups=ParallelGroups.single())
        initialise(model, seed=seed)
        self.embed, self.norm, self.head = model.embed_tokens, model.norm, model.lm_head
        self.feed_forward_norm, self.moe = model.layers[0].feed_forward_norm, model.layers[0].moe
        self.chain = config.chain

    def forward(self, question_T3: Tensor, context: RouterContext) -> tuple[Tensor, list[Routing]]:
        """Return (logits over symbols [T, SYMBOLS], one routing per round)."""
        h_1TD = self.embed(question_T3).sum(1).unsqueeze(0)

        def run_round(u_1TD: Tensor, t: int) -> tuple[Tensor, list[Routing]]:
            return self.moe(u_1TD, dataclasses.replace(context, round=t))

        h_1TD, routings = run_chain(h_1TD, chain=self.chain, norm=self.feed_forward_norm, run_round=run_round)
        return self.head(self.norm(h_1TD))[0, :, -SYMBOLS:], routings


def make_questions(seed: int) -> tuple[Tensor, Tensor]:
    """Return (tokens of i, j and x [8192, 3], answers [8192]) in random order; each has ids of its own."""
    draw = torch.Generator().manual_seed(seed)
    table_FX = torch.randint(SYMBOLS, (TABLES, SYMBOLS), generator=draw)
    i, j, x = torch.cartesian_prod(torch.arange(TABLES), torch.arange(TABLES), torch.arange(SYMBOLS)).unbind(1)
    order = torch.randperm(len(x), generator=draw)
    question_T3 = torch.stack((i, TABLES + j, 2 * TABLES + x), dim=1)
    return question_T3[order], table_FX[i, table_FX[j, x]][order]


def make_config(variant: Variant) -> ModelConfig:
    """Return a model with one layer; of its attention nothing is used."""
    return ModelConfig(
        vocab_size=2 * TABLES + SYMBOLS,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=1,
        tie_word_embeddings=False,
        num_experts=variant.num_experts,
        num_experts_per_tok=variant.num_experts_per_tok,
        moe_intermediate_size=EXPERT_WIDTH,
        router=TopKConfig(),
        chain=variant.chain,
    )


def train(name: str, seed: int, options: Options, commit: str) -> tuple[Row, list[Point]]:
    """Train one model and return its figures and its curve."""
    steps = options.steps
    config = make_config(VARIANTS[name])
    model = Lookup(config, seed)
    question_T3, answer_T = make_questions(seed)
    num_known = len(answer_T) - len(answer_T) // HELD_OUT
    schedule = ScheduleConfig(kind="cosine", warmup_steps=20, min_ratio=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.01), betas=(0.9, 0.95))
    load, balance = GlobalLoad(scope="micro", group=None), BalanceConfig(coefficient=0.01)
    draw = torch.Generator().manual_seed(seed)
    trace = Trace()
    compute = ExpertCompute.of(config)
    for step in range(steps):
        chosen = torch.randint(num_known, (BATCH,), generator=draw)
        start = time.thread_time()
        logits, routings = model(question_T3[chosen], RouterContext(seed=seed, step=step, progress=step / steps))
        terms = micro_batch_loss(
            lm_sum=F.cross_entropy(logits, answer_T[chosen], reduction="sum"),
            statistics=collect(routings),
            load=load,
            balance=balance,
            num_tokens=BATCH,
        )
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * schedule.factor(step, steps=steps)
        optimizer.step()
        optimizer.zero_grad()
        load.end_step()
        trace.times_ms.append((time.thread_time() - start) * 1e3)
        trace.losses.append(terms.lm.item())
        trace.experts.append(compute.num_expert_runs)
    known = evaluate(model, question_T3[:num_known], answer_T[:num_known])
    held_out = evaluate(model, question_T3[num_known:], answer_T[num_known:])
    row = Row(
        date=datetime.date.today().isoformat(),
        commit=commit,
        torch=torch.__version__,
        steps=steps,
        variant=name,
        seed=seed,
        loss=round(known[0], 5),
        loss_held_out=round(held_out[0], 5),
        accuracy=round(known[1], 4),
        accuracy_held_out=round(held_out[1], 4),
        expert_runs=compute.num_expert_runs,
        expert_flops=compute.flops,
        parameters_experts=count_parameters(config).experts,
        load_violation=round(known[2], 4),
        step_ms=round(statistics.median(trace.times_ms), 2),
    )
    return row, trace.points(text="look-ups", steps=steps, variant=name, seed=seed)


@torch.no_grad()
def evaluate(model: Lookup, question_T3: Tensor, answer_T: Tensor) -> tuple[float, float, float]:
    """Return (loss, share of right answers, load violation)."""
    logits, routings = model(question_T3, RouterContext(progress=1.0))
    counts_LE = collect(routings).tokens_per_expert_LE.double()
    violation = (counts_LE.amax(-1) / counts_LE.mean(-1) - 1).mean().item()
    right = (logits.argmax(-1) == answer_T).double().mean().item()
    return F.cross_entropy(logits, answer_T).item(), right, violation


def draw(rows: list[Row], points: list[Point]) -> None:
    """Draw training curves of the main pairs, and the losses of all variants."""
    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    left, *others = figure.subplots(1, 3, width_ratios=[1.1, 1, 1])
    pairs = ("MoE 4/16", "CoE-2 2/16", "CoE-2 shared router", "MoE 8/16", "CoE-2 4/16")
    curves(left, [point for point in points if point.variant in pairs], lambda point: point.loss)
    left.set_title("training loss, nats, mean of seeds", fontsize=9)
    left.legend(fontsize=7)
    variants = list(reversed(VARIANTS))
    titles = {"loss": "loss, questions trained on", "loss_held_out": "loss, held-out questions"}
    for axes, (name, title) in zip(others, titles.items(), strict=True):
        for y, variant in enumerate(variants):
            values = [getattr(row, name) for row in rows if row.variant == variant]
            axes.vlines(statistics.mean(values), y - 0.3, y + 0.3, color="0.4", linewidth=2)
            axes.plot(values, [y] * len(values), "o", color="C0" if "CoE" in variant else "C1", markersize=4)
        axes.set_yticks(range(len(variants)), variants, fontsize=7)
        axes.set_title(title, fontsize=9)
    figure.savefig(IMAGES / "chain.png", metadata={"Software": None})


def main(options: Options) -> None:
    """Run all variants with all seeds, print and draw."""
    torch.set_num_threads(1)  # the clock sees one thread
    console = Console(width=200)
    console.print(str(match_compute(make_config(VARIANTS["CoE-2 2/16"]))))
    path, curves_path = RESULTS / "chain.csv", RESULTS / "chain_curves.csv"
    known = {(row.variant, row.seed): row for row in read(path, Row) if row.steps == options.steps}
    points = [point for point in read(curves_path, Point) if point.steps == options.steps] if options.resume else []
    rows, commit = [], current_commit()
    for seed in options.seeds:
        for name in VARIANTS:
            row = known.get((name, seed)) if options.resume else None
            if row is None:
                row, run_points = train(name, seed, options, commit)
                console.log(f"{name} seed {seed}: {row.loss:.3f}, held out {row.loss_held_out:.3f}")
                points += run_points
                if options.record:
                    append_rows(path, [row])
                    append_rows(curves_path, run_points)
            rows.append(row)
    show(console, "", rows, baseline="MoE 4/16")
    if options.record:
        draw(rows, points)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
