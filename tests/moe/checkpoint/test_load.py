"""Loading: any layout reads any layout, and no damage goes unnoticed."""

import itertools
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch

from moe.checkpoint import CheckpointError, CheckpointReader, Shard, newest_checkpoint, prune, save_checkpoint


def cut(rng: random.Random, name: str, tensor: torch.Tensor, world_size: int) -> list[tuple[int, Shard]]:
    """Cut a tensor into random runs of rows and deal them to random ranks."""
    shape = tuple(tensor.shape)
    if not shape or shape[0] == 0:
        return [(rng.randrange(world_size), Shard(name=name, tensor=tensor, logical_shape=shape))]
    cuts = sorted({0, shape[0], *(rng.randint(0, shape[0]) for _ in range(rng.randint(0, 4)))})
    return [
        (rng.randrange(world_size), Shard(name=name, tensor=tensor[a:b], logical_shape=shape, offset=a))
        for a, b in itertools.pairwise(cuts)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_rows_come_back_right_however_the_tensor_was_cut(seed, tmp_path, save_on_ranks):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tensors = {
        f"t{index}": torch.randn(rng.randint(0, 9), *([3] * rng.randint(0, 2))).to(dtype)
        for index, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64] * 2)
    }
    tensors["int"] = torch.randint(-9, 9, (11,))
    tensors["scalar"] = torch.tensor(seed)
    world_size = rng.randint(1, 4)
    ranks: list[list[Shard]] = [[] for _ in range(world_size)]
    for name, tensor in tensors.items():
        for rank, shard in cut(rng, name, tensor, world_size):
            ranks[rank].append(shard)
    reader = CheckpointReader.open(save_on_ranks(tmp_path, ranks)[0])
    assert reader.names == set(tensors)
    for name, tensor in tensors.items():
        whole = reader.read(name)
        assert torch.equal(whole, tensor)
        assert whole.dtype == tensor.dtype
        if not tensor.dim():
            continue
        for _ in range(8):
            first = rng.randint(0, len(tensor))
            length = rng.randint(0, len(tensor) - first)
            rows = reader.read(name, offset=first, length=length)
            assert torch.equal(rows, tensor[first : first + length])
            assert torch.equal(reader.read(name, offset=first), tensor[first:])


def test_only_the_pieces_that_hold_the_rows_are_read(tmp_path, save_on_ranks):
    w = torch.arange(12.0).reshape(6, 2)
    ranks = [
        [Shard(name="w", tensor=w[2 * rank : 2 * rank + 2], logical_shape=(6, 2), offset=2 * rank)] for rank in range(3)
    ]
    reader = CheckpointReader.open(save_on_ranks(tmp_path, ranks)[0])
    reader._files.pop("rank_00002.safetensors")  # reading from it would now fail
    assert torch.equal(reader.read("w", offset=1, length=2), w[1:3])
    with pytest.raises(KeyError, match="rank_00002"):
        reader.read("w", offset=3, length=2)


def test_what_is_read_belongs_to_the_caller(tmp_path, save_step):
    reader = CheckpointReader.open(save_step(tmp_path, 3))
    for name in ("model/a", "count"):
        reader.read(name).zero_()
        assert reader.read(name).sum() != 0


def test_a_reader_goes_on_while_its_checkpoint_is_removed(tmp_path, save_step):
    reader = CheckpointReader.open(save_step(tmp_path, 1))
    save_step(tmp_path, 2)
    prune(tmp_path, keep=1)
    assert torch.equal(reader.read("model/a"), torch.ones(3, 2))


def test_readers_never_see_a_part_while_checkpoints_come_and_go(tmp_path, save_step):
    stop = threading.Event()
    torn: list[str] = []
    read = 0

    def watch():
        nonlocal read
        while not stop.is_set():
            for path in sorted(tmp_path.glob("step_*")):
                try:
                    reader = CheckpointReader.open(path)
                except CheckpointError as error:
                    if path.exists():
                        torn.append(str(error))
                else:
                    read += 1
                    if not torch.equal(reader.read("model/a"), torch.full((3, 2), float(reader.step))):
                        torn.append(path.name)

    thread = threading.Thread(target=watch)
    thread.start()
    for step in range(1, 31):
        prune(tmp_path, keep=2, known_good=save_step(tmp_path, step))
    stop.set()
    thread.join()
    assert not torn
    assert read > 0


def test_rows_and_names_that_are_not_there_are_refused(tmp_path, save_step):
    reader = CheckpointReader.open(save_step(tmp_path, 1))
    for offset, length in [(-1, 1), (0, 4), (3, 1), (4, 0), (1, -1)]:
        with pytest.raises(ValueError, match=r"'model/a': its shape is \(3, 2\)"):
            reader.read("model/a", offset=offset, length=length)
    for offset, length in [(1, None), (0, 0), (0, 2)]:
        with pytest.raises(ValueError, match="'count'"):
            reader.read("count", offset=offset, length=length)
    for ask in (reader.read, reader.shape, reader.dtype):
        with pytest.raises(CheckpointError, match="holds no tensor 'model/b'"):
            ask("model/b")


@pytest.fixture
def damaged(tmp_path, save_on_ranks, save_step) -> Path:
    """A checkpoint of two ranks, step 2, about to be damaged, with a good one of step 1 beside it."""
    save_step(tmp_path, 1)
    torch.manual_seed(0)
    w = torch.randn(6, 8)
    ranks = [
        [Shard(name="w", tensor=w[:3], logical_shape=(6, 8))],
        [Shard(name="w", tensor=w[3:], logical_shape=(6, 8), offset=3)],
    ]
    return save_on_ranks(tmp_path, ranks, step=2, state={"step": 2, "text": "some state"})[0]


FILES = ["manifest.json", "state.json", "rank_00000.safetensors", "rank_00001.safetensors"]


def assert_refused(path: Path, file: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader.open(path)
    assert file in str(caught.value)
    assert f"the newest good checkpoint beside it is {path.parent / 'step_00000001'}" in str(caught.value)


def assert_passed_over(path: Path, file: str) -> None:
    messages: list[str] = []
    assert newest_checkpoint(path.parent, report=messages.append) == path.parent / "step_00000001"
    assert len(messages) == 1
    assert "step_00000002" in messages[0]
    assert file in messages[0]
    assert path.exists(), "reported, not deleted"


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_is_found_and_the_file_named(file, damaged):
    assert {path.name for path in damaged.iterdir()} == set(FILES)
    rng = random.Random(1)
    content = (damaged / file).read_bytes()
    places = [rng.randrange(8 * len(content)) for _ in range(100)]
    for place in [0, 8 * len(content) - 1, *places]:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (damaged / file).write_bytes(flipped)
        assert_refused(damaged, file)
    assert_passed_over(damaged, file)
    (damaged / file).write_bytes(content)
    assert newest_checkpoint(damaged.parent, report=pytest.fail) == damaged


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_longer_or_missing_file_is_found_and_named(file, damaged):
    content = (damaged / file).read_bytes()
    for damage in [
        b"",
        content[: len(content) // 2],
        content[: len(content) * 99 // 100],
        content[:-1],
        content + b" ",
    ]:
        (damaged / file).write_bytes(damage)
        assert_refused(damaged, file)
        assert_passed_over(damaged, file)
        if file != "manifest.json":
            with pytest.raises(CheckpointError, match=file):
                CheckpointReader.open(damaged, check_hashes=False)
    (damaged / file).unlink()
    assert_refused(damaged, file)
    assert_passed_over(damaged, file)
    (damaged / file).mkdir()
    assert_refused(damaged, file)


def test_files_of_another_checkpoint_are_found(damaged, tmp_path, save_step):
    save_step(tmp_path / "other", 1)
    shutil.copy(tmp_path / "other" / "step_00000001" / "state.json", damaged)
    assert_refused(damaged, "state.json")


def test_a_renamed_checkpoint_is_found_and_a_copy_under_a_name_of_its_own_is_read(tmp_path, save_step):
    path = save_step(tmp_path, 1)
    shutil.copytree(path, tmp_path / "best")
    assert CheckpointReader.open(tmp_path / "best").step == 1
    path.rename(tmp_path / "step_00000009")
    with pytest.raises(CheckpointError, match="holds step 1: the folder was renamed; no good one is beside it"):
        CheckpointReader.open(tmp_path / "step_00000009")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        CheckpointReader.open(tmp_path / "step_00000001")
    (tmp_path / "step_00000002").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        CheckpointReader.open(tmp_path / "step_00000002")


def test_the_newest_is_by_number_and_leftovers_do_not_count(tmp_path, save_step):
    assert newest_checkpoint(tmp_path / "nothing", report=pytest.fail) is None
    assert newest_checkpoint(tmp_path, report=pytest.fail) is None
    for step in (9, 100_000_000, 99_999_999):
        save_step(tmp_path, step)
    shutil.copytree(tmp_path / "step_00000009", tmp_path / ".tmp-step_200000000")
    shutil.copytree(tmp_path / "step_00000009", tmp_path / "step_9")
    (tmp_path / "step_300000000").write_text("a file")
    assert newest_checkpoint(tmp_path, report=pytest.fail) == tmp_path / "step_100000000"


def test_when_no_checkpoint_is_good_all_are_reported(tmp_path, save_step):
    for step in (1, 2):
        (save_step(tmp_path, step) / "state.json").unlink()
    messages: list[str] = []
    assert newest_checkpoint(tmp_path, report=messages.append) is None
    assert ["step_00000002" in messages[0], "step_00000001" in messages[1]] == [True, True]


def test_a_checkpoint_without_tensors_is_a_checkpoint(tmp_path):
    reader = CheckpointReader.open(save_checkpoint(tmp_path, step=0, shards=[], state={"only": "state"}))
    assert (reader.names, reader.state, reader.step) == (frozenset(), {"only": "state"}, 0)
