"""Does balance over the global batch let experts specialise? "Demons in the Detail" (arXiv 2501.11873) in small.

    python benchmarks/papers/global_balance.py                 # the study: 5 variants x 3 seeds, one core
    python benchmarks/papers/global_balance.py --steps 20 --seeds 0 --variants micro global --no-record

Four domains, each a Markov chain over the same vocabulary: what follows a token depends on the domain. Every
micro-batch holds one domain, as it nearly does where a micro-batch is a few long sequences; the eight micro-batches of
a step hold all four. The variants differ only in the frequencies f that the load-balancing loss multiplies with:

    none       no load-balancing loss
    micro      f of the micro-batch
    global     f of the step's micro-batches so far (the paper's buffer)
    exact      f of the whole step, from a counting pass
    shuffled   f of as many tokens as a micro-batch has, drawn from the whole step: small as micro, mixed as global

A seed fixes chains, text, and first weights; the variants of a seed share them, so losses are compared seed by seed.
Rows are appended to results/global_balance.csv, the plot goes to docs/images/global_balance.png.
"""

import csv
import dataclasses
import datetime
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe.balance.load import BalanceConfig, GlobalLoad
from moe.balance.losses import frequency, load_balancing_loss
from moe.balance.statistics import RouterStatistics, collect
from moe.initial import initialise
from moe.inspect.specialisation import mutual_information_L
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routers.topk import TopKConfig
from moe.routing import Routing
from moe.train.loss import language_model_loss, micro_batch_loss
from moe.train.optimizer import parameter_groups
from moe.train.schedule import ScheduleConfig

ROOT = Path(__file__).parents[2]
DOMAINS = 4
SEQUENCE = 64
MICRO_SEQUENCES = 4
MICRO_BATCHES = 8  # of a step: two of each domain, in random order
VALIDATION_SEQUENCES = 64  # of each domain
WINDOW = 50  # load figures are means over the last steps

Variant = Literal["none", "micro", "global", "exact", "shuffled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compare balance scopes on single-domain micro-batches."""

    variants: tuple[Variant, ...] = ("none", "micro", "global", "exact", "shuffled")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 500
    vocabulary: int = 64
    """With 256 tokens, 500 steps do not get beyond what is likely in any domain."""
    coefficient: float = 0.05
    """The smallest of 0.008, 0.02, 0.05 with which `micro` more than halves the violation that `none` has in a
    micro-batch, on seed 100, which the study does not use: 1.49 without, then 1.35, 0.86, 0.38."""
    num_experts: int = 8
    num_experts_per_tok: int = 2
    learning_rate: float = 2e-3
    record: bool = True
    """Append rows to results/global_balance.csv."""
    resume: bool = False
    """Take runs with these settings from results/global_balance.csv where it has them, and train only the rest."""
    plot: bool = True
    """Draw docs/images/global_balance.png."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One run. Load violations are max/mean - 1 of the counts, means over layers and the last 50 steps."""

    date: str
    commit: str
    torch: str
    steps: int
    vocabulary: int
    learning_rate: float
    num_experts: int
    num_experts_per_tok: int
    coefficient: float
    variant: str
    seed: int
    validation_loss: float  # nats per token, mean over domains
    mutual_information: float  # of domain and expert over log(domains), on held-out text, mean over layers
    violation_micro: float  # of single micro-batches
    violation_global: float  # of the whole step
    dead_experts: float  # share of experts without a token in a step
    step_ms: float  # median, time on the core


def make_text(seed: int, num_sequences: int, vocabulary: int) -> Tensor:
    """Return int64 [DOMAINS, num_sequences, SEQUENCE + 1]: chains with sparse transitions, one per domain.

    The chains are one chain under different namings of the tokens: equally hard, but a pair of tokens says nothing
    until the domain is known.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Dirichlet(0.1) rows: a few likely successors for every token
        gamma = torch.distributions.Gamma(torch.full((vocabulary, vocabulary), 0.1, dtype=torch.float64), 1.0).sample()
        base_VV = gamma / gamma.sum(-1, keepdim=True)
        return torch.stack([_sample_chain(base_VV, num_sequences) for _ in range(DOMAINS)])


def _sample_chain(base_VV: Tensor, num_sequences: int) -> Tensor:
    """Return int64 [num_sequences, SEQUENCE + 1] of the chain under a random naming of its tokens."""
    vocabulary = len(base_VV)
    name_V = torch.randperm(vocabulary)
    cumulative_VV = base_VV[name_V][:, name_V].cumsum(-1)
    sequence = [torch.randint(vocabulary, (num_sequences,))]
    for _ in range(SEQUENCE):
        u = torch.rand(num_sequences, 1, dtype=torch.float64)
        sequence.append(torch.searchsorted(cumulative_VV[sequence[-1]], u).squeeze(1).clamp_max(vocabulary - 1))
    return torch.stack(sequence, dim=1)


def micro_batches(text: Tensor, step: int, seed: int) -> list[Tensor]:
    """Return the step's micro-batches, int64 [MICRO_SEQUENCES, SEQUENCE + 1], each of one domain."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    order = torch.randperm(MICRO_BATCHES, generator=generator) % DOMAINS
    per_step = MICRO_BATCHES // DOMAINS * MICRO_SEQUENCES
    taken = [0] * DOMAINS
    batches = []
    for domain in order.tolist():
        start = step * per_step + taken[domain]
        taken[domain] += MICRO_SEQUENCES
        batches.append(text[domain, start : start + MICRO_SEQUENCES])
    return batches


class ShuffledLoad(GlobalLoad):
    """The ablation: f of randomly drawn tokens of the whole step, as many as a micro-batch has."""

    def __init__(self, *, seed: int) -> None:
        super().__init__(scope="micro", group=None)
        self._generator = torch.Generator().manual_seed(seed)
        self._chosen_LTE = torch.empty(0)

    def know(self, routings_of_step: list[list[Routing]]) -> None:
        """Take the choices of every token of the step, from a counting pass."""
        self._chosen_LTE = torch.cat([_chosen_LTE(routings) for routings in routings_of_step], dim=1)

    def balance_loss(self, statistics: RouterStatistics, num_tokens: int) -> Tensor:
        super().balance_loss(statistics, num_tokens)  # remembers the counts
        drawn = torch.randperm(self._chosen_LTE.shape[1], generator=self._generator)[: int(statistics.num_tokens)]
        drawn_LE = self._chosen_LTE[:, drawn].sum(1)
        return load_balancing_loss(frequency(drawn_LE), statistics.prob_sum_LE, num_tokens)


def _chosen_LTE(routings: list[Routing]) -> Tensor:
    """Return 1 where a token chose an expert, else 0; int64."""
    layers = []
    for routing in routings:
        chosen_TE = torch.zeros(routing.logits_TE.shape, dtype=torch.int64)
        chosen_TE[routing.assignment.token_N, routing.assignment.expert_N] = 1
        layers.append(chosen_TE)
    return torch.stack(layers)


def make_model(options: Options, seed: int) -> Model:
    """Return a two-layer MoE with the first weights of `seed`."""
    config = ModelConfig(
        vocab_size=options.vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
        num_experts=options.num_experts,
        num_experts_per_tok=options.num_experts_per_tok,
        moe_intermediate_size=64,
        router=TopKConfig(norm_topk_prob=options.num_experts_per_tok > 1),
    )
    model = Model(config, groups=ParallelGroups.single())
    initialise(model, seed=seed)
    return model


def make_load(variant: Variant, seed: int) -> GlobalLoad:
    """Return what gives the variant its f; for `none` it only counts."""
    if variant == "shuffled":
        return ShuffledLoad(seed=seed)
    return GlobalLoad(scope="micro" if variant == "none" else variant, group=None)


@torch.no_grad()
def look_ahead(model: Model, load: GlobalLoad, batches: list[Tensor]) -> None:
    """Route the whole step once without gradients, for the variants whose f needs it."""
    routings_of_step = [model(batch[:, :-1])[1] for batch in batches]
    if isinstance(load, ShuffledLoad):
        load.know(routings_of_step)
    else:
        counts = [collect(routings).tokens_per_expert_LE for routings in routings_of_step]
        load.expect(torch.stack(counts).sum(0))


def violation(counts_LE: Tensor) -> float:
    """Return max/mean - 1 of each layer's counts, averaged over layers: 0 is even, E/K - 1 the worst."""
    return (counts_LE.amax(-1) / counts_LE.double().mean(-1) - 1).mean().item()


def train(options: Options, variant: Variant, seed: int, report: Callable[[str], None]) -> Row:
    """Train one model and return its figures."""
    per_step = MICRO_BATCHES // DOMAINS * MICRO_SEQUENCES
    text = make_text(seed, options.steps * per_step + VALIDATION_SEQUENCES, options.vocabulary)
    model, load = make_model(options, seed), make_load(variant, seed)
    balance = BalanceConfig(coefficient=0.0 if variant == "none" else options.coefficient)
    schedule = ScheduleConfig(kind="cosine", warmup_steps=20, min_ratio=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), betas=(0.9, 0.95))
    num_tokens = MICRO_BATCHES * MICRO_SEQUENCES * SEQUENCE
    times_ms, micro, whole, dead = [], [], [], []
    for step in range(options.steps):
        batches = micro_batches(text, step, seed)
        start = time.thread_time()
        if variant in ("exact", "shuffled"):
            look_ahead(model, load, batches)
        lm = 0.0
        for batch in batches:
            logits_BSV, routings = model(batch[:, :-1])
            statistics_ = collect(routings)
            lm_sum = language_model_loss(logits_BSV, batch[:, 1:], torch.ones_like(batch[:, 1:], dtype=torch.bool))
            terms = micro_batch_loss(
                lm_sum=lm_sum, statistics=statistics_, load=load, balance=balance, num_tokens=num_tokens
            )
            terms.total.backward()
            lm += terms.lm.item()
            micro.append(violation(statistics_.tokens_per_expert_LE))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule.factor(step, steps=options.steps)
        optimizer.step()
        optimizer.zero_grad()
        counts_LE = load.end_step()
        times_ms.append((time.thread_time() - start) * 1e3)
        whole.append(violation(counts_LE))
        dead.append((counts_LE == 0).double().mean().item())
        if (step + 1) % 100 == 0:
            report(f"{variant} seed {seed} step {step + 1}: lm {lm:.3f}, violation {micro[-1]:.2f} {whole[-1]:.2f}")
    loss, counts_DLE = validate(model, text[:, -VALIDATION_SEQUENCES:])
    return Row(
        date=datetime.date.today().isoformat(),
        commit=current_commit(),
        torch=torch.__version__,
        steps=options.steps,
        vocabulary=options.vocabulary,
        learning_rate=options.learning_rate,
        num_experts=options.num_experts,
        num_experts_per_tok=options.num_experts_per_tok,
        coefficient=balance.coefficient,
        variant=variant,
        seed=seed,
        validation_loss=round(loss, 5),
        mutual_information=round(mutual_information_L(counts_DLE).mean().item(), 5),
        violation_micro=round(statistics.mean(micro[-WINDOW * MICRO_BATCHES :]), 4),
        violation_global=round(statistics.mean(whole[-WINDOW:]), 4),
        dead_experts=round(statistics.mean(dead[-WINDOW:]), 4),
        step_ms=round(statistics.median(times_ms), 2),
    )


@torch.no_grad()
def validate(model: Model, text: Tensor) -> tuple[float, Tensor]:
    """Return (loss in nats per token over all domains, tokens per domain, layer and expert)."""
    loss, counts = 0.0, []
    for sequences in text:
        logits_BSV, routings = model(sequences[:, :-1])
        label_BS = sequences[:, 1:]
        loss += language_model_loss(logits_BSV, label_BS, torch.ones_like(label_BS, dtype=torch.bool)).item()
        counts.append(collect(routings).tokens_per_expert_LE)
    return loss / text[:, :, 1:].numel(), torch.stack(counts)


def current_commit() -> str:
    """Return the commit checked out, marked "-dirty" if files differ from it, or "none" outside a repository."""
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    answer = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else "none"


def append_row(path: Path, row: Row) -> None:
    """Add a row to the CSV. Raises ValueError if its columns are not those of Row."""
    columns = [field.name for field in dataclasses.fields(Row)]
    is_new = not path.exists()
    if not is_new and (found := path.read_text().splitlines()[0].split(",")) != columns:
        raise ValueError(f"{path} has the columns {found}, not {columns}; move it away or pass --no-record")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(dataclasses.asdict(row))


def recorded_row(path: Path, options: Options, variant: Variant, seed: int) -> Row | None:
    """Return the newest recorded run of these settings, or None."""
    if not path.exists():
        return None
    wanted = dataclasses.asdict(options) | {"variant": variant, "seed": seed}
    wanted["coefficient"] = 0.0 if variant == "none" else options.coefficient
    with path.open(newline="") as file:
        rows = TypeAdapter(list[Row]).validate_python(list(csv.DictReader(file)))
    same = [row for row in rows if all(wanted.get(name, value) == value for name, value in vars(row).items())]
    return same[-1] if same else None


FIGURES = {
    "validation_loss": "validation loss",
    "mutual_information": "MI",
    "violation_micro": "violation, micro",
    "violation_global": "violation, global",
    "dead_experts": "dead",
    "step_ms": "step ms",
}


def print_table(console: Console, rows: list[Row]) -> None:
    """Print mean and spread over seeds of every figure, and of the loss minus that of `micro` with the same seed."""
    table = Table("variant", *FIGURES.values(), "loss - micro", box=None, pad_edge=False)
    micro = {row.seed: row.validation_loss for row in rows if row.variant == "micro"}
    for variant in dict.fromkeys(row.variant for row in rows):
        mine = [row for row in rows if row.variant == variant]
        cells = [spread([getattr(row, name) for row in mine]) for name in FIGURES]
        difference = [row.validation_loss - micro[row.seed] for row in mine if row.seed in micro]
        table.add_row(variant, *cells, spread(difference) if difference else "")
    console.print(table)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} +-{deviation:.3f}"


def draw(rows: list[Row], path: Path) -> None:
    """Write a PNG: one panel per figure, one dot per seed, a bar at the mean."""
    titles = {
        "validation_loss": "validation loss, nats per token",
        "mutual_information": "MI(domain; expert) / log 4",
        "violation_micro": "max/mean - 1, micro-batch",
        "violation_global": "max/mean - 1, global batch",
    }
    figure = Figure(figsize=(11, 3.2), dpi=120, layout="constrained")
    variants = list(dict.fromkeys(row.variant for row in rows))
    for axes, name in zip(figure.subplots(1, len(titles)), titles, strict=True):
        for x, variant in enumerate(variants):
            values = [getattr(row, name) for row in rows if row.variant == variant]
            axes.hlines(statistics.mean(values), x - 0.3, x + 0.3, color="0.4", linewidth=2)
            axes.plot([x] * len(values), values, "o", color=f"C{x}", markersize=5)
        axes.set_xticks(range(len(variants)), variants, rotation=45, ha="right")
        axes.set_xlim(-0.6, len(variants) - 0.4)
        axes.set_title(titles[name], fontsize=10)
        if name != "validation_loss":
            axes.set_ylim(bottom=0)
    figure.savefig(path, metadata={"Software": None})


def main(options: Options) -> None:
    """Run the variants of every seed, print and draw."""
    torch.set_num_threads(1)  # the clock sees one thread
    console = Console(width=120)
    results = ROOT / "benchmarks" / "results" / "global_balance.csv"
    rows = []
    for seed in options.seeds:
        for variant in options.variants:
            row = recorded_row(results, options, variant, seed) if options.resume else None
            if row is None:
                row = train(options, variant, seed, console.log)
                if options.record:
                    append_row(results, row)
            rows.append(row)
    print_table(console, rows)
    if options.plot:
        draw(rows, ROOT / "docs" / "images" / "global_balance.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
