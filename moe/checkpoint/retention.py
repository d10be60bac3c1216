"""Which checkpoints to keep. The newest good one is never removed, however many damaged ones are newer."""

from pathlib import Path

from moe.checkpoint.folder import list_checkpoints, remove_checkpoint
from moe.checkpoint.load import newest_of


def prune(checkpoints_dir: Path, keep: int, *, known_good: Path | None = None) -> list[Path]:
    """Remove all but the `keep` newest checkpoints and return what was removed, oldest first.

    If none of the `keep` newest verifies, the newest older one that does is kept as well. To find out, at
    least one checkpoint is read in full; `known_good`, the one just saved, spares that. Raises ValueError
    unless keep >= 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least 1 checkpoint is always kept")
    found = list_checkpoints(checkpoints_dir)
    kept, surplus = found[-keep:], found[:-keep]
    if not surplus:
        return []
    has_known_good = known_good is not None and known_good.name in {path.name for path in kept}
    if not has_known_good and newest_of(kept, report=lambda _: None) is None:
        last_good = newest_of(surplus, report=lambda _: None)
        surplus = [path for path in surplus if path != last_good]
    for path in surplus:
        remove_checkpoint(path)
    return surplus
