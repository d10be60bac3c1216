"""Report: what a run ends with - what the model learned, how its experts share the work, what to try next.

Everything comes from the run's own record: metrics.jsonl, the last evaluation, a sampled text. It reads the same on a
terminal, in a log file and in a README: ASCII, apart from what the model wrote. Letter D counts domains.
"""

import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from moe.inspect.heat_map import heat_map_text, relative_load
from moe.inspect.specialisation import mutual_information_L, preferred_experts
from moe.train.evaluate import DomainEvaluation

# load of the busiest expert over the mean of its layer: healthy up to the first, a case for action from the second on
_EVEN, _UNEVEN = 2.0, 4.0
_PREFERRED_PER_DOMAIN = 2


@dataclass(frozen=True, kw_only=True)
class ReportInput:
    """What a report is made of."""

    run_dir: Path
    script: str  # what was run, as in sys.argv[0], or "-m moe train RECIPE_JSON"
    rows: list[dict[str, Any]]  # of metrics.jsonl
    unigram: dict[str, float]  # by domain, nats per token of the best fixed distribution; may be empty
    evaluations: dict[str, DomainEvaluation]  # by domain, at the end of the run
    sample_prompt: str
    sample_text: str  # what followed the prompt
    moe_layers: Sequence[int | str]  # what to call each routing: its layer, and its round in a chain of experts


def print_report(report: ReportInput, console: Console) -> None:
    """Print the report; write expert_load.png and domain_experts.png into the run folder if there are experts."""
    print_evaluation(report, console)
    _print_sample(report, console)
    counts_DLE = _counts(report.evaluations)
    ep_size = 2 if counts_DLE is not None and counts_DLE.shape[2] % 2 == 0 else 1
    _title("Try next", console)
    console.print(Text(next_commands(report.run_dir, script=report.script, ep_size=ep_size)), soft_wrap=True)


def print_evaluation(report: ReportInput, console: Console) -> None:
    """Print what the model learned and how its experts share the work; the pictures go into the run folder."""
    _print_learned(report, console)
    counts_DLE = _counts(report.evaluations)
    if counts_DLE is not None:
        assert counts_DLE.shape[1] == len(report.moe_layers), "one layer index per routing"
        _print_load(report, counts_DLE, console)
        _print_specialisation(report, counts_DLE, console)


def next_commands(run_dir: Path, *, script: str = "", ep_size: int = 2) -> str:
    """Return three lines to paste into a shell: sample, evaluate, and train on two ranks.

    Programs that the shell would not find by name are written with their folder. Training starts from `script` if
    that is a recipe script or says `-m ...`, else from the run's recipe.json.
    """
    moe, torchrun = _program("moe", "moe"), _program("torchrun", "torch.distributed.run")
    run = shlex.quote(str(run_dir))
    overrides = f"--name {shlex.quote(f'{run_dir.name}-ep{ep_size}' if ep_size > 1 else f'{run_dir.name}-2')}"
    if script.startswith("-m "):
        source = script
    elif script.endswith(".py") and Path(script).name != "__main__.py":
        source = shlex.quote(_shown(Path(script)))
        if str(run_dir.parent) != "runs":
            overrides += f" --runs-dir {shlex.quote(str(run_dir.parent))}"
    else:
        source = f"-m moe train {shlex.quote(str(run_dir / 'recipe.json'))}"
    if ep_size > 1:
        overrides += f" --parallel.ep-size {ep_size}"
    return (
        f'{moe} sample {run} --prompt "def "\n'
        f"{moe} eval {run}\n"
        f"{torchrun} --nproc-per-node 2 {source} {overrides} --trainer.steps 100"
    )


def _program(name: str, module: str) -> str:
    """Return how this environment's program `name` is started from the user's shell."""
    folder = Path(sys.executable).parent
    if not (folder / name).exists():
        return f"{shlex.quote(_shown(Path(sys.executable)))} -m {module}"
    found = shutil.which(name)
    # another environment's program of the same name would not know this one's packages
    is_on_path = found is not None and Path(found).parent.samefile(folder)
    return name if is_on_path else shlex.quote(_shown(folder / name))


def _shown(path: Path) -> str:
    """Return the path relative to the working directory if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _title(text: str, console: Console) -> None:
    console.print()
    console.rule(Text(text, style="bold"), align="left", characters="-")


def _printable(text: str, console: Console) -> str:
    """Return text that any output takes: byte-level models write control characters too, and not all logs are UTF-8."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return shown.encode(console.encoding, errors="replace").decode(console.encoding)


def _print_learned(report: ReportInput, console: Console) -> None:
    _title("What the model learned", console)
    rows = [row for row in report.rows if row.get("perf/tokens_per_s") is not None]
    if rows:
        tokens_per_s = statistics.median(row["perf/tokens_per_s"] for row in rows)
        last = rows[-1]
        console.print(f"{last['step']:,} steps, {last['tokens']:,} tokens, {tokens_per_s:,.0f} tokens/s (median)")
    before = _losses_before(report)
    console.print("Loss on held-out text, in nats per token:")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("domain", overflow="fold")
    columns = ["tokens", "before", *(["unigram"] if report.unigram else []), "after", "perplexity", "bits/byte"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, result in report.evaluations.items():
        figures = {
            "tokens": f"{result.num_tokens:,}",
            "before": _figure(before.get(name), 3),
            "unigram": _figure(report.unigram.get(name), 3),
            "after": _figure(result.loss if result.num_tokens else None, 3),
            "perplexity": _figure(result.perplexity if result.num_tokens else None, 2),
            "bits/byte": _figure(result.bits_per_byte if result.num_tokens else None, 3),
        }
        table.add_row(Text(_printable(name, console)), *(figures[column] for column in columns))
    console.print(table)
    if report.unigram:
        console.print("(unigram: the loss of knowing only how often each token occurs)")
    for sentence in _learning_verdict(report, before):
        console.print(sentence)


def _losses_before(report: ReportInput) -> dict[str, float | None]:
    """Return the loss of each domain at step 0, as far as metrics.jsonl has it."""
    rows = [row for row in report.rows if row["step"] == 0 and any(key.startswith("eval/") for key in row)]
    return {name: rows[0].get(f"eval/{name}/loss") for name in report.evaluations} if rows else {}


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _learning_verdict(report: ReportInput, before: dict[str, float | None]) -> list[str]:
    """Return a sentence on each comparison that can be made."""
    sentences = []
    for baseline, words in ((before, "lower than before training"), (report.unigram, "below the unigram baseline")):
        pairs = [
            (result.loss, reference)
            for name, result in report.evaluations.items()
            if result.num_tokens and (reference := baseline.get(name)) is not None
        ]
        if pairs:
            num_better = sum(loss < reference for loss, reference in pairs)
            sentences.append(f"The loss is {words} in {num_better} of {len(pairs)} {_plural('domain', len(pairs))}.")
    return sentences


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _counts(evaluations: dict[str, DomainEvaluation]) -> Tensor | None:
    """Return routed rows [D, L, E]; None without experts or without a single row."""
    counts = [result.tokens_per_expert_LE for result in evaluations.values()]
    known = [counts_LE for counts_LE in counts if counts_LE is not None]
    if not known or not any(counts_LE.any() for counts_LE in known):
        return None
    # a domain without held-out text has seen no expert
    return torch.stack([torch.zeros_like(known[0]) if counts_LE is None else counts_LE for counts_LE in counts])


def _print_load(report: ReportInput, counts_DLE: Tensor, console: Console) -> None:
    # a second to import, which only the end of a run pays
    from moe.inspect.pictures import domain_heat_map, load_heat_map

    _title("How the experts share the work", console)
    counts_LE = counts_DLE.sum(0)
    for line in heat_map_text(counts_LE, layers=report.moe_layers, width=console.width):
        console.print(line, soft_wrap=True)
    console.print(_load_verdict(counts_LE, report.moe_layers))
    load_png, domains_png = report.run_dir / "expert_load.png", report.run_dir / "domain_experts.png"
    load_heat_map(counts_LE, load_png, layers=report.moe_layers)
    domain_heat_map(counts_DLE, list(report.evaluations), domains_png, layers=report.moe_layers)
    console.print(Text(f"As pictures: {_shown(load_png)}, {_shown(domains_png)}"), soft_wrap=True)


def _load_verdict(counts_LE: Tensor, layers: Sequence[int | str]) -> str:
    """Return one sentence on idle and busy experts, and what to do about them."""
    E = counts_LE.shape[1]
    idle = (counts_LE == 0).nonzero().tolist()
    ratio_LE = relative_load(counts_LE).nan_to_num(0.0)
    busiest = ratio_LE.max().item()
    layer, expert = divmod(int(ratio_LE.argmax()), E)
    if not idle:
        idleness = "no expert is idle"
    else:
        where = "; ".join(f"layer {layers[i]} expert {e}" for i, e in idle[:3]) + ("; ..." if len(idle) > 3 else "")
        idleness = f"{len(idle)} of {counts_LE.numel()} experts {'is' if len(idle) == 1 else 'are'} idle ({where})"
    facts = f"{idleness}; the busiest takes {busiest:.1f}x the mean (layer {layers[layer]} expert {expert})"
    if not idle and busiest <= _EVEN:
        return f"Healthy: {facts}."
    if not idle and busiest < _UNEVEN:
        return f"A little uneven: {facts}."
    return f"Uneven: {facts}. If it stays so, raise --balance.coefficient."


def _print_specialisation(report: ReportInput, counts_DLE: Tensor, console: Console) -> None:
    _title("Which experts each domain prefers", console)
    if sum(bool(counts_LE.any()) for counts_LE in counts_DLE) < 2:
        console.print("There is text of one domain only: nothing to compare it with.")
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold", max_width=20)
    grid.add_column()
    preferred_D = preferred_experts(counts_DLE, _PREFERRED_PER_DOMAIN)
    for name, preferred in zip(report.evaluations, preferred_D, strict=True):
        lines = [
            f"layer {report.moe_layers[p.layer]} expert {p.expert} takes {p.share:.0%} of its rows, "
            f"{p.lift:.1f}x the mean of all domains"
            for p in preferred
        ]
        grid.add_row(Text(_printable(name, console)), "\n".join(lines) or "none more than the other domains")
    console.print(grid)
    console.print("How far domains differ in their experts (0 = not at all, 1 = none in common):")
    figures = zip(report.moe_layers, mutual_information_L(counts_DLE).tolist(), strict=True)
    console.print(Columns([f"layer {layer}: {value:.3f}" for layer, value in figures], padding=(0, 3)))


def _print_sample(report: ReportInput, console: Console) -> None:
    _title("A text from the model", console)
    text = Text(_printable(report.sample_prompt, console), style="bold")
    console.print(Panel(Text.assemble(text, _printable(report.sample_text, console)), box=box.ASCII))
