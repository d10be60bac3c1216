"""Saving: what comes back is what went in, and a save that fails changes nothing on any rank."""

import errno
import json
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe.checkpoint import (
    CheckpointError,
    CheckpointReader,
    Shard,
    list_checkpoints,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from moe.checkpoint import save as save_module


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_dtype_and_shape_comes_back_bit_by_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "fp32": torch.randn(5, 3),
        "bf16": torch.randn(4, 2, 3).bfloat16(),
        "fp64": torch.randn(2, dtype=torch.float64),
        "fp16": torch.randn(3).half(),
        "int64": torch.tensor([-(2**63), 0, 2**63 - 1]),
        "int32": torch.tensor([-5, 7], dtype=torch.int32),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.25),
        "scalar_int": torch.tensor(-7),
        "no_rows": torch.empty(0, 4),
        "no_columns": torch.empty(4, 0, dtype=torch.bfloat16),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
        "odd name: layers.0/\u00fc 'x' @3": torch.randn(1, 1, 1, 1),
    }
    shards = [Shard(name=name, tensor=t, logical_shape=tuple(t.shape)) for name, t in tensors.items()]
    state = {
        "step": 7,
        "nested": {"list": [1, 2.5, None, True], "text": "\u00fc"},
        "big": 2**80,
        "tiny": 1e-300,
    }
    path = save_checkpoint(tmp_path / "checkpoints", step=7, shards=shards, state=state)
    assert path == tmp_path / "checkpoints" / "step_00000007"
    reader = CheckpointReader.open(path)
    assert (reader.step, reader.state, reader.names) == (7, state, set(tensors))
    for name, tensor in tensors.items():
        loaded = reader.read(name)
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert (loaded.shape, loaded.dtype) == (tensor.shape, tensor.dtype)
        assert loaded.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def test_the_files_are_plain_safetensors_and_json(tmp_path):
    w = torch.arange(6.0).reshape(3, 2)
    path = save_checkpoint(tmp_path, step=1, shards=[Shard(name="w", tensor=w, logical_shape=(3, 2))], state={"a": 1})
    assert names_in(path) == {"rank_00000.safetensors", "state.json", "manifest.json"}
    assert torch.equal(load_file(path / "rank_00000.safetensors")["w"], w)
    assert json.loads((path / "state.json").read_bytes()) == {"a": 1}
    modes = {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert len(modes) == 1, "who may read one file may read all"


def test_strided_shared_and_tied_tensors_are_stored_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(4, 3)
    views = {"whole": base, "tied": base, "transposed": base.t(), "rows": base[1:3], "column": base[:, 1]}
    parameter = torch.nn.Parameter(base.clone())
    shards = [Shard(name=name, tensor=t, logical_shape=tuple(t.shape)) for name, t in views.items()]
    shards.append(Shard(name="parameter", tensor=parameter, logical_shape=(4, 3)))
    reader = CheckpointReader.open(save_checkpoint(tmp_path, step=1, shards=shards, state={}))
    for name, view in views.items():
        assert torch.equal(reader.read(name), view), name
    assert torch.equal(reader.read("parameter"), base)


def test_pieces_of_many_ranks_make_one_tensor(tmp_path, save_on_ranks):
    w = torch.randn(7, 3)
    step = torch.tensor(5)
    ranks = [
        [Shard(name="w", tensor=w[4:], logical_shape=(7, 3), offset=4)],
        [
            Shard(name="w", tensor=w[0:1], logical_shape=(7, 3)),
            Shard(name="s", tensor=step, logical_shape=()),
        ],
        [Shard(name="w", tensor=w[3:3], logical_shape=(7, 3), offset=3)],
        [
            Shard(name="w", tensor=w[1:2], logical_shape=(7, 3), offset=1),
            Shard(name="w", tensor=w[2:4], logical_shape=(7, 3), offset=2),
        ],
    ]
    outcomes = save_on_ranks(tmp_path, ranks, step=3)
    assert outcomes == [tmp_path / "step_00000003"] * 4
    reader = CheckpointReader.open(outcomes[0])
    assert torch.equal(reader.read("w"), w)
    assert torch.equal(reader.read("s"), step)
    assert len([name for name in names_in(outcomes[0]) if name.startswith("rank_")]) == 4


def test_shards_may_be_a_generator_and_are_all_taken_before_anything_is_written(tmp_path):
    def shards():
        for index in range(3):
            assert not list(tmp_path.iterdir())
            yield Shard(name=f"w{index}", tensor=torch.full((2,), float(index)), logical_shape=(2,))

    reader = CheckpointReader.open(save_checkpoint(tmp_path, step=0, shards=shards(), state={}))
    assert [reader.read(f"w{index}")[0].item() for index in range(3)] == [0, 1, 2]


PIECE = torch.zeros(2, 3)
BAD_SHARDS = {
    "is no part of the shape": [Shard(name="w", tensor=PIECE, logical_shape=(4, 2))],
    "is no part of the shape ": [Shard(name="w", tensor=PIECE, logical_shape=(6,))],
    "are outside of": [Shard(name="w", tensor=PIECE, logical_shape=(3, 3), offset=2)],
    "are outside of ": [Shard(name="w", tensor=PIECE, logical_shape=(3, 3), offset=-1)],
    "lacks rows 0..0": [Shard(name="w", tensor=PIECE, logical_shape=(3, 3), offset=1)],
    "has 2 rows stored": [Shard(name="w", tensor=PIECE, logical_shape=(3, 3))],
    "lacks rows 2..3": [
        Shard(name="w", tensor=PIECE, logical_shape=(6, 3)),
        Shard(name="w", tensor=PIECE, logical_shape=(6, 3), offset=4),
    ],
    "has row 1 twice": [
        Shard(name="w", tensor=PIECE, logical_shape=(3, 3)),
        Shard(name="w", tensor=PIECE, logical_shape=(3, 3), offset=1),
    ],
    "two pieces that would be stored as 'w'": [Shard(name="w", tensor=PIECE, logical_shape=(2, 3))] * 2,
    "two pieces that would be stored as 'w@2'": [
        Shard(name="w", tensor=PIECE, logical_shape=(4, 3)),
        Shard(name="w", tensor=PIECE, logical_shape=(4, 3), offset=2),
        Shard(name="w@2", tensor=PIECE, logical_shape=(2, 3)),
    ],
    "disagree": [
        Shard(name="w", tensor=PIECE, logical_shape=(4, 3)),
        Shard(name="w", tensor=PIECE.double(), logical_shape=(4, 3), offset=2),
    ],
    "disagree: ": [
        Shard(name="w", tensor=PIECE, logical_shape=(4, 3)),
        Shard(name="w", tensor=PIECE, logical_shape=(5, 3), offset=2),
    ],
    "do not store": [Shard(name="w", tensor=PIECE.to(torch.complex64), logical_shape=(2, 3))],
    "cannot be the name": [Shard(name="__metadata__", tensor=PIECE, logical_shape=(2, 3))],
}


@pytest.mark.parametrize("words", BAD_SHARDS)
def test_pieces_that_make_no_tensor_are_refused_and_leave_nothing(words, tmp_path):
    with pytest.raises(CheckpointError, match=words.strip()):
        save_checkpoint(tmp_path, step=1, shards=BAD_SHARDS[words], state={})
    assert names_in(tmp_path) == set()


def test_two_ranks_that_bring_the_same_rows_are_refused(tmp_path, save_on_ranks):
    same = [Shard(name="w", tensor=torch.zeros(2, 2), logical_shape=(2, 2))]
    for outcome in save_on_ranks(tmp_path, [same, same]):
        assert isinstance(outcome, CheckpointError)
        assert "'w' has row 0 twice" in str(outcome)


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {1: "a"}, {"a": float("nan")}, {"a": float("inf")}, {"a": {1, 2}}])
def test_a_state_that_json_would_change_is_refused(state, tmp_path):
    with pytest.raises(CheckpointError, match=r"rank 0: (ValueError|TypeError)"):
        save_checkpoint(tmp_path, step=1, shards=[], state=state)
    assert names_in(tmp_path) == set()


def test_a_good_checkpoint_is_never_overwritten(tmp_path, save_step, assert_holds_step):
    path = save_step(tmp_path, 4)
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_checkpoint(tmp_path, step=4, shards=[], state={})
    assert_holds_step(path, 4)
    assert names_in(tmp_path) == {path.name}


def test_a_damaged_checkpoint_makes_room_and_is_kept_aside(tmp_path, save_step, assert_holds_step):
    for number in range(2):
        path = save_step(tmp_path, 4)
        assert_holds_step(path, 4)
        (path / "state.json").write_text(f"damage {number}")
    assert_holds_step(save_step(tmp_path, 4), 4)
    assert names_in(tmp_path) == {
        "step_00000004",
        ".corrupt-step_00000004",
        ".corrupt-step_00000004-1",
    }
    assert (tmp_path / ".corrupt-step_00000004" / "state.json").read_text() == "damage 0"


def test_many_ranks_need_a_gather(tmp_path):
    with pytest.raises(ValueError, match="world_size is 2"):
        save_checkpoint(tmp_path, step=1, shards=[], state={}, world_size=2)


def fail(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_on_rank(function, rank):
    def wrapped(tensors, path):
        if Path(path).name == f"rank_{rank:05d}.safetensors":
            Path(path).write_bytes(b"half")
            fail()
        return function(tensors, path)

    return wrapped


@pytest.mark.parametrize("fault", ["rank 0", "rank 1", "rank 2", "write_durable", "fsync_file", "rename", "mkdir"])
def test_a_full_disk_on_any_rank_stops_all_ranks_and_keeps_the_previous_checkpoint(
    fault, tmp_path, save_on_ranks, save_step, assert_holds_step, monkeypatch
):
    save_step(tmp_path, 1)
    ranks = [[Shard(name=f"w{rank}", tensor=torch.ones(2), logical_shape=(2,))] for rank in range(3)]
    with monkeypatch.context() as patch:
        if fault.startswith("rank"):
            patch.setattr(save_module, "save_file", fail_on_rank(save_module.save_file, int(fault[-1])))
        elif fault in ("rename", "mkdir"):
            patch.setattr(os, fault, fail)
        else:
            patch.setattr(save_module, fault, fail)
        outcomes = save_on_ranks(tmp_path, ranks, step=2)
    assert {type(outcome) for outcome in outcomes} == {CheckpointError}
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "No space left on device" in str(outcomes[0])
    assert "step_00000002 was not saved" in str(outcomes[0])
    if fault.startswith("rank"):
        assert f"{fault}: OSError" in str(outcomes[0])
    assert names_in(tmp_path) == {"step_00000001"}
    assert_holds_step(tmp_path / "step_00000001", 1)
    # and the next try, with room on the disk, succeeds
    assert save_on_ranks(tmp_path, ranks, step=2) == [tmp_path / "step_00000002"] * 3


def test_a_shard_that_cannot_be_made_on_one_rank_stops_all_ranks(tmp_path, save_on_ranks):
    def broken():
        yield Shard(name="w", tensor=torch.ones(2), logical_shape=(2,))
        raise RuntimeError("CUDA out of memory")

    outcomes = save_on_ranks(tmp_path, [[], broken(), []])
    assert {str(outcome) for outcome in outcomes} == {
        f"checkpoint {tmp_path}/step_00000001 was not saved; rank 1: RuntimeError: CUDA out of memory"
    }
    assert isinstance(outcomes[1].__cause__, RuntimeError)
    assert names_in(tmp_path) == set()


def test_a_file_that_the_kernel_refuses_to_grow_is_an_error_not_a_torn_checkpoint(tmp_path, save_step):
    save_step(tmp_path, 1)
    shard = Shard(name="w", tensor=torch.zeros(2**18), logical_shape=(2**18,))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="step_00000002 was not saved"):
            save_checkpoint(tmp_path, step=2, shards=[shard], state={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_checkpoint(tmp_path, report=pytest.fail) == tmp_path / "step_00000001"
    assert names_in(tmp_path) == {"step_00000001"}


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_folder_that_the_ranks_do_not_share_is_noticed(lose, tmp_path, save_on_ranks, monkeypatch):
    real = save_module.hash_file

    def hash_then_lose(path):
        digest = real(path)
        if "rank_00001" in path.name:
            lose(path)
        return digest

    monkeypatch.setattr(save_module, "hash_file", hash_then_lose)
    for outcome in save_on_ranks(tmp_path, [[], []]):
        assert "does not see rank_00001.safetensors" in str(outcome)


def test_a_crash_at_any_line_of_a_save_leaves_the_old_or_the_new_checkpoint(
    tmp_path, save_step, assert_holds_step, crash_everywhere
):
    def prepare():
        for path in list_checkpoints(tmp_path)[1:]:
            shutil.rmtree(path)

    save_step(tmp_path, 1)
    found = []
    points = crash_everywhere(tmp_path, prepare=prepare, work=lambda: save_step(tmp_path, 2))
    for point in points:
        newest = newest_checkpoint(tmp_path, report=lambda message: pytest.fail(message))
        assert newest is not None, point
        found.append(newest.name)
        assert_holds_step(newest, int(newest.name[-1]))
        if point % 25 == 0:  # with its leftovers in place every time, removed first every other time
            if point % 50 == 0:
                remove_leftovers(tmp_path)
            if newest.name == "step_00000001":
                assert_holds_step(save_step(tmp_path, 2), 2)
    assert set(found) == {"step_00000001", "step_00000002"}, "the crashes fell before and after the rename"
    assert len(found) > 60


def test_a_crash_while_replacing_a_damaged_checkpoint_loses_nothing(
    tmp_path, save_step, assert_holds_step, crash_everywhere
):
    damaged, aside = tmp_path / "step_00000002", tmp_path / ".corrupt-step_00000002"
    save_step(tmp_path, 1)
    (save_step(tmp_path, 2) / "state.json").write_bytes(b"{}")

    def prepare():
        if aside.exists():
            if damaged.exists():
                shutil.rmtree(damaged)
            aside.rename(damaged)

    found = set()
    for _ in crash_everywhere(tmp_path, prepare=prepare, work=lambda: save_step(tmp_path, 2)):
        newest = newest_checkpoint(tmp_path, report=lambda _: None)
        assert newest is not None
        assert_holds_step(newest, int(newest.name[-1]))
        assert damaged.exists() or aside.exists()
        found.add(newest.name)
    assert found == {"step_00000001", "step_00000002"}


def test_everything_is_flushed_to_the_disk_before_the_name_appears(tmp_path, save_on_ranks, monkeypatch):
    flushed: list[int] = []
    at_rename: list[int] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        real_fsync(descriptor)
        flushed.append(os.fstat(descriptor).st_ino)

    def rename(source, target):
        inodes = {file.stat().st_ino for file in Path(source).iterdir()} | {Path(source).stat().st_ino}
        assert inodes <= set(flushed)
        assert flushed[-1] == Path(source).stat().st_ino, "the folder after the files in it"
        at_rename.append(len(flushed))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    outcomes = save_on_ranks(tmp_path, [[], [], []])
    assert outcomes == [tmp_path / "step_00000001"] * 3
    assert len(at_rename) == 1
    assert flushed[at_rename[0] :] == [tmp_path.stat().st_ino], "the rename itself is flushed"
