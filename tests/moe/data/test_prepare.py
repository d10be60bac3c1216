"""Prepared data: the same bytes for the same inputs, built once, complete or absent, and checked when opened."""

import dataclasses
import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pydantic
import pytest

import moe.data.build
from moe.data.corpus import BUILTINS
from moe.data.documents import Document
from moe.data.prepare import DataConfig, prepare, validate_data
from moe.data.store import DamagedDataError, PreparedData, open_prepared
from moe.data.tokenizer import TextEncoder, load_tokenizer

TEXTS = [f"text {index} " + "some words and numbers 123 " * (index % 7 + 1) for index in range(40)]


class Log(list[str]):
    """Collects what `prepare` reports."""

    def __call__(self, message: str) -> None:
        self.append(message)

    def count_of(self, words: str) -> int:
        return sum(words in message for message in self)


def _write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """One small domain of JSON lines."""
    path = _write_jsonl(tmp_path / "texts.jsonl")
    return DataConfig(sources={"mine": str(path)}, cache_dir=str(tmp_path / "cache"), vocab_size=300)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _texts(data: PreparedData, part: str, domain: int = 0) -> list[str]:
    """Decode the documents of a part."""
    tokenizer, file = load_tokenizer(data.tokenizer_dir), getattr(data.domains[domain], part)
    texts = []
    for start, end in zip(file.starts, file.starts[1:], strict=False):
        ids = file.tokens[start:end].tolist()
        assert ids[-1] == data.eos_token_id
        assert data.eos_token_id not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1]))
    return texts


def test_building_twice_gives_the_same_bytes(builtin_data: PreparedData, tmp_path: Path) -> None:
    config = DataConfig(cache_dir=str(tmp_path), builtin_bytes=60_000, vocab_size=600)
    again = prepare(config, report=Log())
    assert _files(again.directory) == _files(builtin_data.directory)
    assert again.fingerprint == builtin_data.fingerprint
    assert again.directory.name == builtin_data.directory.name


def test_built_in_domains_are_complete_and_their_parts_disjoint(builtin_data: PreparedData) -> None:
    assert [domain.name for domain in builtin_data.domains] == ["cpp", "maths", "prose", "python"]
    manifest = json.loads((builtin_data.directory / "manifest.json").read_bytes())
    for index, domain in enumerate(builtin_data.domains):
        train, validation = _texts(builtin_data, "train", index), _texts(builtin_data, "validation", index)
        assert train
        assert validation
        assert not {" ".join(text.split()) for text in train} & {" ".join(text.split()) for text in validation}
        assert sum(len(text.encode()) for text in train) == domain.train.num_bytes
        assert sum(len(text.encode()) for text in validation) == domain.validation.num_bytes
        assert domain.train.num_bytes + domain.validation.num_bytes >= 60_000
        assert len(train) == domain.train.num_documents
        facts = manifest["domains"][domain.name]
        assert facts["licence"]
        assert facts["source"]
        assert facts["train"]["tokens"] == domain.train.num_tokens == domain.train.counts.sum()


def test_texts_come_back_from_their_tokens(config: DataConfig) -> None:
    data = prepare(config, report=Log())
    assert sorted(_texts(data, "train") + _texts(data, "validation")) == sorted(TEXTS)
    (domain,) = data.domains
    assert domain.share == 1.0
    assert domain.train.tokens.dtype == np.uint16
    assert np.array_equal(np.bincount(domain.train.tokens, minlength=data.vocab_size), domain.train.counts)


def test_every_format_gives_the_same_tokens(config: DataConfig, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    compressed = tmp_path / "texts.jsonl.gz"
    compressed.write_bytes(gzip.compress((tmp_path / "texts.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "texts.parquet")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "dataset"))
    (tmp_path / "folder").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / "folder" / f"{index:02}.txt").write_text(text)
    fingerprint = prepare(config, report=Log()).fingerprint
    for name in ("texts.jsonl.gz", "texts.parquet", "dataset", "folder"):
        other = dataclasses.replace(config, sources={"mine": str(tmp_path / name)})
        assert prepare(other, report=Log()).fingerprint == fingerprint


def test_tokenizer_is_trained_on_nothing_that_is_held_out(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train, seen = moe.data.build.train_tokenizer, []

    def train_and_watch(texts: Iterable[str], *, vocab_size: int, folder: Path) -> None:
        seen.extend(texts)
        train(seen, vocab_size=vocab_size, folder=folder)

    monkeypatch.setattr(moe.data.build, "train_tokenizer", train_and_watch)
    data = prepare(config, report=Log())
    assert sorted(seen) == sorted(_texts(data, "train"))
    assert _texts(data, "validation")


def test_second_call_finds_the_cache_without_a_word(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config, report=Log())
    monkeypatch.setattr(moe.data.build, "build", None)
    log = Log()
    second = prepare(config, report=log)
    assert log == []
    assert second.directory == first.directory
    assert second.fingerprint == first.fingerprint


def test_weights_and_packing_do_not_build_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(config, report=Log())
    monkeypatch.setattr(moe.data.build, "build", None)
    (domain,) = prepare(dataclasses.replace(config, weights={"mine": 3.0}, packing="pad"), report=Log()).domains
    assert (domain.weight, domain.packing) == (3.0, "pad")


def test_shares_are_those_of_the_weights(builtin_data: PreparedData) -> None:
    data = open_prepared(builtin_data.directory, weights={"python": 2.0, "maths": 0.5})
    assert {domain.name: domain.share for domain in data.domains} == pytest.approx(
        {"cpp": 1 / 4.5, "maths": 0.5 / 4.5, "prose": 1 / 4.5, "python": 2 / 4.5}
    )
    assert [domain.index for domain in data.domains] == [0, 1, 2, 3]


def test_changed_text_is_built_anew_with_another_fingerprint(config: DataConfig, tmp_path: Path) -> None:
    before = prepare(config, report=Log())
    _write_jsonl(tmp_path / "texts.jsonl", [*TEXTS, "one more"])
    after = prepare(config, report=Log())
    assert after.fingerprint != before.fingerprint
    assert after.directory != before.directory


def test_same_text_with_another_date_keeps_its_fingerprint(config: DataConfig, tmp_path: Path) -> None:
    before = prepare(config, report=Log())
    os.utime(tmp_path / "texts.jsonl", (1, 1))
    after = prepare(config, report=Log())
    assert after.directory != before.directory
    assert after.fingerprint == before.fingerprint


def test_order_of_sources_does_not_matter(config: DataConfig, tmp_path: Path) -> None:
    other = str(_write_jsonl(tmp_path / "other.jsonl", [text.upper() for text in TEXTS]))
    forth = dataclasses.replace(config, sources={**config.sources, "also": other})
    back = dataclasses.replace(config, sources={"also": other, **config.sources})
    assert prepare(forth, report=Log()).directory == prepare(back, report=Log()).directory


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        (Path.unlink, "is missing"),
    ],
    ids=["bit flipped", "cut short", "deleted"],
)
def test_damage_to_any_file_is_refused_by_name_and_repaired(
    config: DataConfig, damage: Callable[[Path], None], message: str
) -> None:
    folder = prepare(config, report=Log()).directory
    intact = _files(folder)
    for name in intact:
        damage(folder / name)
        with pytest.raises(DamagedDataError, match=f"{Path(name).name} {message}"):
            open_prepared(folder, weights={})
        for path, content in intact.items():
            (folder / path).write_bytes(content)
    damage(folder / "mine.train.tokens")
    log = Log()
    prepare(config, report=log)
    assert f"mine.train.tokens {message}" in log[0]
    assert "again" in log[0]
    assert _files(folder) == intact


def test_build_that_fails_leaves_nothing_and_killed_ones_are_cleared(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(config.cache_dir)
    with monkeypatch.context() as patch:
        patch.setattr(moe.data.build, "write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config, report=Log())
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    name = prepare(config, report=Log()).directory.name
    (cache / name).rename(cache / f".building-{name}")  # as a kill in the middle of a build leaves it
    (cache / f".building-{name}" / "mine.train.tokens").write_bytes(b"half")
    prepare(config, report=Log())
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [name]


def test_callers_at_the_same_time_build_once(config: DataConfig) -> None:
    log = Log()
    with ThreadPoolExecutor(4) as pool:
        data = list(pool.map(lambda _: prepare(config, report=log), range(4)))
    assert len({one.fingerprint for one in data}) == 1
    assert log.count_of("training a tokenizer") == 1


def test_text_that_changes_while_it_is_read_is_refused(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = moe.data.build.train_tokenizer

    def train_and_change(texts: Iterable[str], *, vocab_size: int, folder: Path) -> None:
        train(texts, vocab_size=vocab_size, folder=folder)
        _write_jsonl(tmp_path / "texts.jsonl", [*TEXTS, "one more"])

    monkeypatch.setattr(moe.data.build, "train_tokenizer", train_and_change)
    with pytest.raises(ValueError, match="has changed while it was read"):
        prepare(config, report=Log())


def test_single_document_is_cut_and_said_so(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("".join(f"Line {index} of the novel.\n" for index in range(500)))
    log = Log()
    data = prepare(dataclasses.replace(config, sources={"novel": str(tmp_path / "novel.txt")}), report=log)
    assert log.count_of("its last 5.0% is held out") == 1
    assert _texts(data, "train")[0] + _texts(data, "validation")[0] == (tmp_path / "novel.txt").read_text()


def test_small_text_says_that_its_vocabulary_is_small(config: DataConfig) -> None:
    log = Log()
    data = prepare(dataclasses.replace(config, vocab_size=100_000), report=log)
    assert data.vocab_size < 1000
    assert log.count_of(f"a tokenizer of {data.vocab_size} tokens only") == 1


def test_built_in_text_that_runs_out_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(name=text[:7], text=text) for text in TEXTS]
    builtin = dataclasses.replace(BUILTINS["maths"], documents=lambda: iter(documents))
    monkeypatch.setitem(BUILTINS, "maths", builtin)
    log = Log()
    prepare(DataConfig(sources={"maths": "builtin:maths"}, cache_dir=str(tmp_path), vocab_size=300), report=log)
    assert log.count_of("there is no more than that, 2.50 MB were asked for") == 1


@pytest.fixture
def own_tokenizer(builtin_data: PreparedData, tmp_path: Path) -> Path:
    """A tokenizer of 600 tokens that came from elsewhere."""
    return Path(shutil.copytree(builtin_data.tokenizer_dir, tmp_path / "tokenizer"))


def test_tokenizer_of_the_user_is_taken_and_kept(config: DataConfig, own_tokenizer: Path) -> None:
    data = prepare(dataclasses.replace(config, tokenizer=str(own_tokenizer)), report=Log())
    assert data.vocab_size == 600
    expected = TextEncoder(own_tokenizer).encode(_texts(data, "train"))
    assert data.domains[0].train.tokens.tolist() == [token for ids in expected for token in ids]


def _write_megatron(path: Path, documents: list[list[int]]) -> Path:
    lengths = np.array([len(ids) for ids in documents], np.int32)
    positions = (np.cumsum(lengths) - lengths).astype(np.int64) * 4
    path.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(np.int32).tobytes())
    path.with_suffix(".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, len(documents), len(documents) + 1)
        + lengths.tobytes()
        + positions.tobytes()
        + np.arange(len(documents) + 1).tobytes()
    )
    return path.with_suffix(".bin")


def test_token_ids_of_megatron_are_taken_as_they_are(config: DataConfig, own_tokenizer: Path, tmp_path: Path) -> None:
    documents = [[index, 599, index + 1, 7] for index in range(1, 41)]
    path = _write_megatron(tmp_path / "ids", documents)
    mixed = {**config.sources, "ids": str(path)}
    data = prepare(dataclasses.replace(config, sources=mixed, tokenizer=str(own_tokenizer)), report=Log())
    (domain,) = [domain for domain in data.domains if domain.name == "ids"]
    parts = [domain.train, domain.validation]
    read = [
        part.tokens[start:end].tolist()
        for part in parts
        for start, end in zip(part.starts, part.starts[1:], strict=False)
    ]
    assert sorted(read) == sorted(documents)
    assert all(part.num_documents > 0 and part.num_bytes == 0 for part in parts)


@pytest.mark.parametrize("bad", [600, -1])
def test_token_ids_beyond_the_tokenizer_are_refused(
    bad: int, config: DataConfig, own_tokenizer: Path, tmp_path: Path
) -> None:
    path = _write_megatron(tmp_path / "ids", [[1, 2], [3, bad], [4, 5]])
    wrong = dataclasses.replace(config, sources={"ids": str(path)}, tokenizer=str(own_tokenizer))
    with pytest.raises(ValueError, match=f"document 1 holds token {bad}, but data.tokenizer has 600 tokens"):
        prepare(wrong, report=Log())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "data.sources is empty"),
        ({"sources": {"a b": "builtin:maths"}}, "a domain 'a b'"),
        ({"sources": {"../a": "builtin:maths"}}, "a domain '../a'"),
        ({"sources": {"a": "builtin:math"}}, "'builtin:math' is unknown; built in are builtin:python"),
        ({"sources": {"a": "/no/such/path"}}, "domain 'a': /no/such/path does not exist"),
        ({"sources": {"a": "/no/such/ids.bin"}}, r"domain 'a': /no/such/ids.idx is missing"),
        ({"weights": {"b": 1.0}}, "data.weights names 'b'; the domains are mine"),
        ({"weights": {"mine": 0.0}}, "'mine' is 0.0, and must be above 0"),
        ({"weights": {"mine": float("nan")}}, "'mine' is nan"),
        ({"tokenizer": "/no/such/folder"}, "data.tokenizer = '/no/such/folder' is no folder"),
        ({"vocab_size": 257}, "data.vocab_size = 257 must be at least 258"),
        ({"text_field": ""}, "data.text_field is empty"),
        ({"validation_fraction": 0.0}, "data.validation_fraction = 0.0 must be above 0"),
        ({"validation_fraction": 0.6}, "data.validation_fraction = 0.6 must be .* at most 0.5"),
        ({"builtin_bytes": 0}, "data.builtin_bytes = 0 is below"),
        ({"cache_dir": __file__}, "is a file; name a folder"),
    ],
)
def test_wrong_value_is_refused_with_the_remedy(changes: dict[str, object], message: str, config: DataConfig) -> None:
    validate_data(config)
    with pytest.raises(ValueError, match=message):
        validate_data(dataclasses.replace(config, **changes))


def test_token_ids_without_a_tokenizer_are_refused(config: DataConfig, tmp_path: Path) -> None:
    path = _write_megatron(tmp_path / "ids", [[1, 2], [3]])
    with pytest.raises(ValueError, match=r"domain 'ids' holds token ids; say whose with data.tokenizer"):
        validate_data(dataclasses.replace(config, sources={"ids": str(path)}))


def test_configuration_survives_json_and_refuses_unknown_fields(config: DataConfig) -> None:
    adapter = pydantic.TypeAdapter(DataConfig)
    assert adapter.validate_json(adapter.dump_json(config)) == config
    with pytest.raises(pydantic.ValidationError, match="cache_folder"):
        adapter.validate_json(b'{"cache_folder": "x"}')


def test_command_line_replaces_the_sources() -> None:
    tyro = pytest.importorskip("tyro")
    read = tyro.cli(DataConfig, default=DataConfig(), args=["--sources", "mine", "/texts", "--weights", "mine", "2.5"])
    assert read.sources == {"mine": "/texts"}
    assert read.weights == {"mine": 2.5}
