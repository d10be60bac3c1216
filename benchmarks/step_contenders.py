"""The models of bench_step_gpu.py as steps to be timed: ours under its engine, transformers' in a plain loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from bench_step import renamed
from step_profile import Phases
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe.balance.load import BalanceConfig
from moe.blocks.norm import RMSNorm
from moe.data.tokens import Batch
from moe.initial import residual_std
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelConfig, ParallelGroups
from moe.train.optimizer import OptimizerConfig

LEARNING_RATE = 1e-5
BALANCES: tuple[float | None, ...] = (None, 0.0, 0.01)


@dataclass
class Taken:
    """What a step gave back."""

    loss: float
    max_over_mean: float | None = None


Step = Callable[[Tensor], Taken]


@dataclass
class Contender:
    """Steps of one model, by balance coefficient. `close` frees what the garbage collector does not find."""

    name: str
    steps: dict[float | None, Step]
    phases: Phases
    close: Callable[[], None]
    losses: list[float] = field(default_factory=list)
    last: dict[float | None, Taken] = field(default_factory=dict)


@torch.no_grad()
def fill(model: Model, device: torch.device) -> None:
    """Draw the weights on the device, where billions take no time; spread as moe.initial does, other numbers."""
    norms = {id(m.weight) for m in model.modules() if isinstance(m, RMSNorm)}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        is_output = name.endswith(("o_proj.weight", "down_proj"))
        std = residual_std(model.config) if is_output else model.config.initializer_range
        if id(parameter) in norms:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, std, generator=torch.Generator(device).manual_seed(index))


class _Unwatched:
    """An engine whose model keeps its routings to itself: the step has nothing to count or balance."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        logits_BSV, _ = self._engine(*args, **kwargs)
        return logits_BSV, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def ours(config: ModelConfig, device: torch.device, backend: str, micro_batches: int = 1) -> Contender:
    """Return our model under its engine, as a recipe runs it on one process."""
    from moe.train.engine import Engine
    from moe.train.step import TrainStep

    groups = ParallelGroups.create(ep_size=1, device=device)
    with torch.device(device):
        model = Model(config, groups=groups, backend=backend)
    fill(model, device)
    parallel = ParallelConfig(zero_stage=1, dtype="bf16")
    engine = Engine(model=model, groups=groups, optimizer=OptimizerConfig(), parallel=parallel)
    phases = Phases(device)
    engine.backward = phases.around("backward", engine.backward)  # type: ignore[method-assign]
    engine.step = phases.around("update", engine.step)  # type: ignore[method-assign]

    def make(coefficient: float | None) -> Step:
        balance = BalanceConfig(coefficient=coefficient or 0.0)
        watched: Any = _Unwatched(engine) if coefficient is None else engine
        train_step = TrainStep(engine=watched, groups=groups, balance=balance, seed=0)

        def step(token: Tensor) -> Taken:
            batches = [make_batch(part) for part in token.chunk(micro_batches)]
            record = train_step.run(batches, step=0, progress=0.0, learning_rate=LEARNING_RATE)
            return Taken(record.lm_loss, record.load.max_over_mean if record.load is not None else None)

        return step

    def close() -> None:
        engine.close()
        release(model, engine.torch_optimizer)

    return Contender("ours", {coefficient: make(coefficient) for coefficient in BALANCES}, phases, close)


def release(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Free weights, gradients, masters and moments: DeepSpeed's parameters outlive it, in circles none can collect."""
    parameters = [*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])]
    gradients = [p.grad for p in parameters if p.grad is not None]
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    for tensor in (*parameters, *gradients, *moments):
        tensor.untyped_storage().resize_(0)


def make_batch(token: Tensor) -> Batch:
    """Return random tokens [B, S + 1] as a batch of B documents."""
    B, S = token.shape[0], token.shape[1] - 1
    return Batch(
        token_BS=token[:, :-1].contiguous(),
        label_BS=token[:, 1:].contiguous(),
        valid_BS=torch.ones(B, S, dtype=torch.bool),
        document_BS=torch.zeros(B, S, dtype=torch.int64),
        domain_B=torch.zeros(B, dtype=torch.int64),
        position_BS=torch.arange(B * S).view(B, S),
    )


def theirs(config: ModelConfig, device: torch.device, implementation: str, micro_batches: int = 1) -> Contender:
    """Return transformers' OLMoE with the same weights, in a plain loop."""
    with torch.device(device):
        model = OlmoeForCausalLM(their_config(config, implementation))
        source = Model(config, groups=ParallelGroups.single(device))
    fill(source, device)
    model.load_state_dict(renamed(source.state_dict()))
    del source
    for parameter in model.parameters():
        # weights alone: a cast of the module would round the frequencies of the rotary embedding as well
        parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    phases = Phases(device)

    def step(token: Tensor) -> Taken:
        total = 0.0
        for part in token.to(device, non_blocking=True).chunk(micro_batches):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten()) / micro_batches
            with phases.of("backward"):
                loss.backward()
            total = total + loss.detach()
        with phases.of("update"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return Taken(float(total))

    return Contender(f"transformers {implementation}", {None: step}, phases, lambda: None)


def their_config(config: ModelConfig, implementation: str) -> OlmoeConfig:
    """Return our configuration in transformers' words."""
    return OlmoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        experts_implementation=implementation,
        attn_implementation="sdpa",
    )
