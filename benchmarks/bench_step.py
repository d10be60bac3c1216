"""Time a training step of one OLMoE-shaped model, here and in transformers: same weights, same batches.

    python benchmarks/bench_step.py                              prints a table
    python benchmarks/bench_step.py --machine cpu_2core_epyc     and adds rows to results/step_cpu_2core_epyc.csv

The model: 4 layers, hidden 512, expert width 256, 64 experts, top-8; 2,048 tokens a step. A step is forward, backward,
clipping and AdamW, without auxiliary losses. Contenders take turns, each on fresh random tokens, so that a busy machine
slows all alike and no shape is met twice by chance. The fastest of transformers' expert implementations is the one to
compare with. In bf16, ours keeps float32 masters and accumulates gradients in float32; transformers' model and its
optimizer are bf16 alone, which is less work.
"""

import datetime
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from result_rows import append_rows, current_commit
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe.balance.load import BalanceConfig
from moe.data.tokens import Batch
from moe.initial import initialise
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelConfig, ParallelGroups, start_process_group
from moe.routers.topk import TopKConfig
from moe.train import prepare_environment
from moe.train.optimizer import OptimizerConfig

VOCAB, SEQUENCES, LENGTH = 4096, 8, 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results"
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=False,
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=256,
    qk_norm="full",
    rms_norm_eps=1e-5,
    router=TopKConfig(),
)
Step = Callable[[Tensor], float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of results."""

    date: str
    commit: str
    torch: str
    threads: int
    dtype: str
    contender: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ours_is_faster_by: float


def ours(backend: str, dtype: str) -> Step:
    """Return a step of our model through the engine, as a recipe runs it."""
    from moe.train.engine import Engine
    from moe.train.step import TrainStep

    groups = ParallelGroups.create(ep_size=1, device=torch.device("cpu"))
    model = Model(CONFIG, groups=groups, backend=backend)
    initialise(model, seed=0)
    parallel = ParallelConfig(zero_stage=1, dtype=dtype)  # type: ignore[arg-type]
    engine = Engine(model=model, groups=groups, optimizer=OptimizerConfig(), parallel=parallel)
    train_step = TrainStep(engine=engine, groups=groups, balance=BalanceConfig(coefficient=0.0), seed=0)

    def step(token: Tensor) -> float:
        batch = Batch(
            token_BS=token[:, :-1],
            label_BS=token[:, 1:],
            valid_BS=torch.ones(SEQUENCES, LENGTH, dtype=torch.bool),
            document_BS=torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64),
            domain_B=torch.zeros(SEQUENCES, dtype=torch.int64),
            position_BS=torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH),
        )
        return train_step.run([batch], step=0, progress=0.0, learning_rate=1e-5).lm_loss

    return step


def theirs(implementation: str, dtype: str) -> Step:
    """Return a step of transformers' OLMoE with our weights."""
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        experts_implementation=implementation,
    )
    model = OlmoeForCausalLM(config)
    source = Model(CONFIG, groups=ParallelGroups.single())
    initialise(source, seed=0)
    model.load_state_dict(renamed(source.state_dict()))
    model = model.to(DTYPES[dtype]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(token: Tensor) -> float:
        logits = model(input_ids=token[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), token[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our state dict under transformers' names; the layouts are the same."""
    pairs = (
        ("attention_norm.", "input_layernorm."),
        ("feed_forward_norm.", "post_attention_layernorm."),
        ("attention.", "self_attn."),
        ("moe.router.", "mlp.gate."),
        ("moe.experts.", "mlp.experts."),
    )
    result = {}
    for name, tensor in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        result[name if name.startswith("lm_head") else f"model.{name}"] = tensor
    return result


def make_contenders(dtype: str) -> dict[str, Step]:
    """Return what is compared: our backends, and transformers' expert implementations that run here."""
    steps = {f"ours {backend}": ours(backend, dtype) for backend in ("segments", "torch_grouped")}
    # not batched_mm: it copies the weights of each row's expert, 17 GB for one layer of this step
    for implementation in ("grouped_mm", "eager"):
        steps[f"transformers {implementation}"] = theirs(implementation, dtype)
    return steps


def tokens(seed: int) -> Tensor:
    """Return random tokens [8, 257]."""
    return torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def check(steps: dict[str, Step], dtype: str) -> None:
    """Take two steps with each contender and compare the losses: the second one has seen an update."""
    tolerance = {"fp32": 2e-5, "bf16": 5e-3}[dtype]
    for seed in (0, 1):
        losses = {name: step(tokens(seed)) for name, step in steps.items()}
        first = next(iter(losses.values()))
        for name, loss in losses.items():
            assert abs(loss - first) <= tolerance * first, (name, loss, losses)


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return milliseconds per step of each contender; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name, step in steps.items():
            token = tokens(100 + index)
            started = time.perf_counter()
            step(token)
            times[name].append(1000 * (time.perf_counter() - started))
    return times


def main(
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16"),
    rounds: int = 7,
    threads: int = 0,
    machine: str = "",
) -> None:
    """Compare training steps.

    Args:
        dtypes: which to run.
        rounds: steps of each contender.
        threads: of torch; 0 takes all cores.
        machine: name of the CSV file to add rows to; empty writes none.
    """
    torch.set_num_threads(threads or os.cpu_count() or 1)
    start_process_group(timeout_s=60)
    prepare_environment("cpu")
    rows: list[Row] = []
    for dtype in dtypes:
        steps = make_contenders(dtype)
        check(steps, dtype)
        times = measure(steps, rounds)
        reference = statistics.median(times["ours segments"])
        for name, values in times.items():
            p20, p50, p80 = (statistics.quantiles(values, n=10)[k] for k in (1, 4, 7))
            rows.append(
                Row(
                    **stamp(),
                    dtype=dtype,
                    contender=name,
                    p20_ms=p20,
                    p50_ms=p50,
                    p80_ms=p80,
                    ours_is_faster_by=p50 / reference,
                )
            )
    show(rows)
    if machine:
        append_rows(RESULTS / f"step_{machine}.csv", rows)


def stamp() -> dict[str, Any]:
    """Return what every row of one run shares."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": current_commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table("dtype", "contender", "p20 ms", "p50 ms", "p80 ms", "ours (segments) is faster by")
    for row in rows:
        table.add_row(
            row.dtype,
            row.contender,
            *(f"{v:.0f}" for v in (row.p20_ms, row.p50_ms, row.p80_ms)),
            f"{row.ours_is_faster_by:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
