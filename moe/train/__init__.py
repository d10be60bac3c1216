"""Training: the engine (DeepSpeed), the step and its loss, schedules, evaluation, tracking."""

import os
import warnings


def prepare_environment(device_type: str) -> None:
    """Set what DeepSpeed reads when it is imported; call before the first import of `moe.train.engine`.

    DeepSpeed probes for accelerators and warns when it settles on the CPU; naming the accelerator keeps it quiet.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("LOCAL_RANK", "0")
    # ranks on this host; without it DeepSpeed counts NUMA nodes
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames; nothing a user can act on
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
