"""Names in the folder that holds the checkpoints of one run.

step_00000100/           a checkpoint; the name appears only when everything in it is on the disk
.tmp-step_00000200/      a save that is under way, or was interrupted
.trash-step_00000050/    a removal that is under way, or was interrupted
.corrupt-step_00000200/  a damaged checkpoint that made room for a new save of the same step, kept for a look
"""

import re
import shutil
from pathlib import Path

_CHECKPOINT = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.(tmp|trash)-step_\d{8,}")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of optimizer step `step`."""
    assert step >= 0, step
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step that the name of the folder `path` states, None if it is not a checkpoint's name."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Return the checkpoints in `checkpoints_dir` by name alone, oldest step first; nothing is verified."""
    if not checkpoints_dir.is_dir():
        return []
    found = [(step, path) for path in checkpoints_dir.iterdir() if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found) if path.is_dir()]


def remove_leftovers(checkpoints_dir: Path) -> list[Path]:
    """Delete and return what interrupted saves and removals left. Only for the holder of the run lock."""
    if not checkpoints_dir.is_dir():
        return []
    leftovers = sorted(path for path in checkpoints_dir.iterdir() if _LEFTOVER.fullmatch(path.name))
    for path in leftovers:
        shutil.rmtree(path)
    return leftovers


def remove_checkpoint(path: Path) -> None:
    """Delete the checkpoint `path`. It loses its name first: a crash half-way leaves no half checkpoint."""
    trash = path.with_name(f".trash-{path.name}")
    if trash.exists():
        shutil.rmtree(trash)
    path.rename(trash)
    shutil.rmtree(trash)


def set_aside(path: Path) -> Path:
    """Rename the damaged checkpoint `path` out of the way, without deleting it, and return its new path."""
    number = 0
    target = path.with_name(f".corrupt-{path.name}")
    while target.exists():
        number += 1
        target = path.with_name(f".corrupt-{path.name}-{number}")
    path.rename(target)
    return target
