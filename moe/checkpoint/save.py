"""Saving: every rank writes one file into a hidden folder; a rename makes the checkpoint appear, complete.

1. each rank collects its shards; rank 0 makes `.tmp-step_...`
2. each rank writes `rank_<r>.safetensors`, flushes it, and tells the others its size, sha256 and contents
3. rank 0 checks that the pieces cover every tensor, writes state.json and manifest.json, flushes, renames

Each step ends with one gather that carries the failures, so that all ranks go on or all raise the same error:
a rank that fails alone would leave the others waiting for ever. Until the rename, nothing that a reader looks
at has changed.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file

from moe.checkpoint.atomic import encode_json, fsync_file, fsync_folder, write_durable
from moe.checkpoint.folder import checkpoint_name, set_aside
from moe.checkpoint.load import hash_file, newest_of
from moe.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CheckpointError,
    FileRecord,
    Manifest,
    check_index,
    encode_manifest,
)
from moe.checkpoint.shards import Pieces, Shard, collect, merge

# A small JSON-able object of each rank -> those of all ranks, in rank order.
Gather = Callable[[Any], list[Any]]
_Result = TypeVar("_Result")


def save_checkpoint(
    checkpoints_dir: Path,
    *,
    step: int,
    shards: Iterable[Shard],
    state: dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> Path:
    """Write the checkpoint of optimizer step `step` and return its folder, `checkpoints_dir/step_<step>`.

    Called by all ranks at once; `gather` connects them (not needed for one). Every row of every logical
    tensor comes from exactly one rank. `shards` is run through once, to its end, before anything is written,
    and each tensor is moved to the CPU as it comes: it may be a generator that communicates. `state` of rank
    0 is stored, as JSON. `checkpoints_dir` has to be one folder for all ranks.

    Raises CheckpointError on all ranks if any rank fails, if the pieces do not make up the tensors, or if a
    good checkpoint of this step is there already. Earlier checkpoints are then intact and nothing is left
    behind.
    """
    if gather is None:
        if world_size != 1:
            raise ValueError(f"world_size is {world_size}, so the ranks need a gather to connect them")
        gather = _gather_alone
    final = checkpoints_dir / checkpoint_name(step)
    job = _Job(final=final, step=step, rank=rank, world_size=world_size)
    try:
        _together(gather, final, lambda: job.prepare(shards, state))
        reports = _together(gather, final, job.write)
        _together(gather, final, lambda: job.commit(reports))
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)
        raise
    return final


def _gather_alone(value: Any) -> list[Any]:
    return [value]


def _together(gather: Gather, final: Path, work: Callable[[], _Result]) -> list[_Result]:
    """Run `work` on every rank and return all results; if any rank fails, raise the same error on all."""
    cause = None
    try:
        outcome = {"result": work(), "error": None}
    except Exception as error:  # noqa: BLE001 - the other ranks must hear of it; raised below
        cause = error
        outcome = {"result": None, "error": f"{type(error).__name__}: {error}"}
    outcomes = gather(outcome)
    failures = [f"rank {rank}: {other['error']}" for rank, other in enumerate(outcomes) if other["error"]]
    if failures:
        raise CheckpointError(f"checkpoint {final} was not saved; {'; '.join(failures)}") from cause
    return [outcome["result"] for outcome in outcomes]


@dataclass(kw_only=True)
class _Job:
    """One save, as one rank sees it."""

    final: Path
    step: int
    rank: int
    world_size: int
    pieces: Pieces = field(default_factory=lambda: Pieces(tensors={}, index=[]))
    state: bytes = b""

    @property
    def temporary(self) -> Path:
        return self.final.with_name(f".tmp-{self.final.name}")

    def prepare(self, shards: Iterable[Shard], state: dict[str, Any]) -> None:
        """Collect the tensors of this rank; rank 0 makes the folder."""
        self.pieces = collect(shards)
        if self.rank != 0:
            return
        self.state = encode_json(state)
        if self.final.exists() and newest_of([self.final], report=lambda _: None):
            raise CheckpointError("a good checkpoint of this step is there already; it is never overwritten")
        self.final.parent.mkdir(parents=True, exist_ok=True)
        fsync_folder(self.final.parent.parent)
        if self.temporary.exists():
            shutil.rmtree(self.temporary)  # of a save that was interrupted
        self.temporary.mkdir()

    def write(self) -> dict[str, Any]:
        """Write and flush the file of this rank; return what it is, for the manifest."""
        path = self.temporary / f"rank_{self.rank:05d}.safetensors"
        path.touch()
        mode = path.stat().st_mode
        save_file(self.pieces.tensors, path)
        path.chmod(mode)  # the umask decides who may read it, as for the other files; safetensors makes it private
        self.pieces.tensors.clear()
        fsync_file(path)
        record = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        return {"file": path.name, "record": record, "index": self.pieces.index}

    def commit(self, reports: list[dict[str, Any]]) -> None:
        """On rank 0: write the rest, check the whole, and give the checkpoint its name."""
        if self.rank != 0:
            return
        write_durable(self.temporary / STATE, self.state)
        files = {report["file"]: FileRecord(**report["record"]) for report in reports}
        files[STATE] = FileRecord(bytes=len(self.state), sha256=hash_file(self.temporary / STATE))
        tensors = merge({report["file"]: report["index"] for report in reports})
        manifest = Manifest(step=self.step, world_size=self.world_size, files=files, tensors=tensors)
        check_index(manifest, self.final)
        for name, record in files.items():
            path = self.temporary / name
            if not path.is_file() or path.stat().st_size != record.bytes:
                raise CheckpointError(f"rank 0 does not see {name} as it was written: is the folder shared?")
        write_durable(self.temporary / MANIFEST, encode_manifest(manifest))
        fsync_folder(self.temporary)
        if self.final.exists():
            set_aside(self.final)  # `prepare` found it damaged
        self.temporary.rename(self.final)
        fsync_folder(self.final.parent)
