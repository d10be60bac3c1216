"""Engine: forward, backward, step and state of a model under DeepSpeed 0.19, on one CPU process as on many GPUs.

What DeepSpeed does: shards optimizer state (ZeRO 1) and gradients (ZeRO 2), reduces gradients, keeps float32 masters.
What it does not do here: count micro-batches, scale the loss, or schedule anything. The caller hands `backward` one
scalar whose gradient, averaged over the ranks, is the gradient of the step.

At stage 0 DeepSpeed 0.19.8 returns no gradient norm, clips wrongly under expert parallelism and applies NaN gradients;
there, norm, clipping and the skip run in the torch optimizer's step pre-hook.

One rank reduces nothing, and in float32 its weights are its masters. There DeepSpeed's buckets, its copies of every
gradient and its second set of weights are left out: a tenth of a CPU step (docs/performance.md).
"""

import contextlib
import io
import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from moe.parallel.groups import ParallelConfig, ParallelGroups
from moe.train.adoption import adopt, is_expert_parameter, split_expert_groups
from moe.train.optimizer import OptimizerConfig, freeze, parameter_groups


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float  # over all parameters of the model, before clipping
    is_skipped: bool  # the norm was not finite and no parameter moved


class Engine:
    """A model under DeepSpeed.

    Args:
        model: built on `groups.device`, weights initialised in float32.
        groups: of this rank; the default process group must be initialised.
        optimizer: AdamW settings.
        parallel: ZeRO stage, which one rank may lower (`zero_stage` is the one that runs), and dtype.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        groups: ParallelGroups,
        optimizer: OptimizerConfig,
        parallel: ParallelConfig,
    ) -> None:
        deepspeed_logger.setLevel(logging.ERROR)
        if groups.device.type == "cpu":
            _switch_off_shared_memory_op()
        freeze(model, optimizer)
        adopt(model, groups)
        self.groups = groups
        self.zero_stage = parallel.stage_on(groups.world_size)
        self.max_grad_norm = optimizer.max_grad_norm
        self.torch_optimizer = torch.optim.AdamW(
            split_expert_groups(parameter_groups(model, weight_decay=optimizer.weight_decay)),
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            fused=True,
        )
        self._check_groups(model)
        self._hook_norm = math.nan
        if self.zero_stage == 0:
            self.torch_optimizer.register_step_pre_hook(self._clip_before_step)
        with contextlib.redirect_stdout(io.StringIO()):  # the bf16 optimizer prints memory tables unasked
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.torch_optimizer,
                config=_deepspeed_config(self.zero_stage, parallel.dtype, optimizer.max_grad_norm),
            )
        self._engine: Any = engine
        if hasattr(engine.optimizer, "_update_hp_grad"):
            _sum_gradients_in_one_pass(engine.optimizer)
        if groups.world_size == 1:
            # what is left of DeepSpeed's reduction: a parameter that no loss touched has a gradient of zero
            self._engine.buffered_allreduce_fallback = lambda **_: self._engine._get_gradients_for_reduction()

    @property
    def module(self) -> nn.Module:
        """The model; parameters keep their names."""
        return self._engine.module

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer of stages 1 and 2, for moe.train.state."""
        return self._engine.optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar, to the step's."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, *, learning_rate: float) -> StepResult:
        """Reduce, clip, update and clear the gradients of the micro-batches since the last step."""
        for group in self.torch_optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._hook_norm if self.zero_stage == 0 else float(self._engine.get_global_grad_norm())
        return StepResult(grad_norm=norm, is_skipped=not math.isfinite(norm))

    def close(self) -> None:
        """Release what DeepSpeed holds. The process group stays the caller's."""
        self._engine.destroy()

    def _check_groups(self, model: nn.Module) -> None:
        """Every trainable parameter belongs to exactly one optimizer group, before DeepSpeed flattens them."""
        counts = Counter(id(p) for group in self.torch_optimizer.param_groups for p in group["params"])
        wrong = [name for name, p in model.named_parameters() if p.requires_grad and counts[id(p)] != 1]
        assert not wrong, f"{', '.join(wrong)} must be in exactly one optimizer group"

    @torch.no_grad()
    def _clip_before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Stage 0: gradients are reduced, the optimizer is about to use them."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._hook_norm = global_norm([(p, p.grad) for p in parameters], self.groups)
        if not math.isfinite(self._hook_norm):
            # without a gradient AdamW leaves a parameter and its moments alone
            for parameter in parameters:
                parameter.grad = None
        elif self.max_grad_norm > 0:
            scale = min(1.0, self.max_grad_norm / (self._hook_norm + 1e-6))
            for parameter in parameters:
                parameter.grad.mul_(scale)


def end_process_group() -> None:
    """Destroy the default process group, and what DeepSpeed remembers of it: another run may follow in this process."""
    if comm.is_initialized():
        comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


def global_norm(gradients: list[tuple[nn.Parameter, Tensor | None]], groups: ParallelGroups) -> float:
    """Return the 2-norm over the whole model of reduced gradients: experts are summed over the expert group."""
    dense = torch.zeros((), dtype=torch.float64, device=groups.device)
    expert = dense.clone()
    for parameter, gradient in gradients:
        if gradient is not None:
            # float32 along rows, float64 across them: 1e-8 off and 20 times faster on CPUs than float64 throughout,
            # where float32 throughout is 1e-3 off for 16 million elements (torch 2.13, EPYC, 2026-11)
            square = torch.linalg.vector_norm(gradient, dim=-1).double().square().sum()
            if is_expert_parameter(parameter):
                expert += square
            else:
                dense += square
    if groups.expert_group is not None:
        dist.all_reduce(expert, group=groups.expert_group)
    square = (dense + expert).item()
    # what stages 1 and 2 cannot sum in float32 is skipped there; so here
    return math.inf if square > torch.finfo(torch.float32).max else math.sqrt(square)


def _deepspeed_config(zero_stage: int, dtype: str, max_grad_norm: float) -> dict[str, Any]:
    config: dict[str, Any] = {
        # bookkeeping only: the caller normalises the loss and decides when a step ends
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # stage 0 clips in the pre-hook: DeepSpeed's own clipping is wrong there under expert parallelism
        "gradient_clipping": max_grad_norm if zero_stage else 0.0,
        "zero_optimization": {
            "stage": zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
        },
        "steps_per_print": 10**9,
        # its clock waits for the GPU before every forward and after every step
        "timers": {"throughput": {"enabled": False}},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        if zero_stage == 1:
            # DeepSpeed would round the accumulated float32 gradients to bfloat16 to sum them over ranks
            config["communication_data_type"] = "fp32"
    return config


def _sum_gradients_in_one_pass(optimizer: Any) -> None:
    """Let DeepSpeed's bfloat16 optimizer add gradients to their float32 sums without a float32 copy of each.

    The first one of a step is copied, as its sum is zero; sums that nothing was added to are not cleared again.
    """
    clear_sums = optimizer.clear_hp_grads

    def add(parameter: nn.Parameter, group: int, index: int, clears_gradient: bool) -> None:
        if parameter.grad is None:
            return
        total, was_added = optimizer.fp32_groups_gradients[group][index], optimizer.fp32_groups_has_gradients[group]
        gradient = parameter.grad.detach().view(total.shape)
        total.add_(gradient) if was_added[index] else total.copy_(gradient)
        parameter._hp_grad = total  # pyright: ignore[reportAttributeAccessIssue]
        was_added[index] = True
        if clears_gradient:
            parameter.grad.zero_()

    def clear() -> None:
        if any(any(was_added) for was_added in optimizer.fp32_groups_has_gradients):
            clear_sums()

    optimizer._update_hp_grad, optimizer.clear_hp_grads = add, clear


def _switch_off_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling a C++ operator at start-up on CPUs; only its inference path uses it.

    Reading the table asks every operator whether it could be built, which starts compilers: GPUs do without.
    """
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
