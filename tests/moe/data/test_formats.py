"""Every format gives the same texts, and what cannot be read is named with its file and line."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe.data.formats import check_readable, read_documents

TEXTS = [
    "plain words\nin two lines\n",
    "umlaut \u00e4, \u6f22\u5b57, emoji \U0001f600, \u2028 separator",
    "\ttabs and  spaces  ",
    "x" * 3000,
]


def _jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": index, field: text}) + "\n" for index, text in enumerate(texts)).encode()


def _write_txt(path: Path) -> Path:
    for index, text in enumerate(TEXTS):
        file = path / "sub" / f"{index}.txt" if index % 2 else path / f"part{index}" / f"{index}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    (path / "README.md").write_text("not read")
    return path


def _write_jsonl(path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> Path:
    path.mkdir()
    file = path / f"texts.jsonl{suffix}"
    file.write_bytes(compress(_jsonl(TEXTS)))
    return file


def _zstandard(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


def _write_parquet(path: Path) -> Path:
    path.mkdir()
    for index in range(2):
        half = TEXTS[2 * index : 2 * index + 2]
        table = pyarrow.table({"id": list(range(len(half))), "text": half})
        pyarrow.parquet.write_table(table, path / f"{index}.parquet", row_group_size=1)
    return path


def _write_dataset(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS}).save_to_disk(str(path))
    return path


def _write_dataset_splits(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"text": TEXTS})
    test = datasets.Dataset.from_dict({"text": ["not read"]})
    datasets.DatasetDict({"test": test, "train": train}).save_to_disk(str(path))
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "txt": _write_txt,
    "jsonl": lambda path: _write_jsonl(path, "", bytes),
    "jsonl.gz": lambda path: _write_jsonl(path, ".gz", gzip.compress),
    "jsonl.bz2": lambda path: _write_jsonl(path, ".bz2", bz2.compress),
    "jsonl.xz": lambda path: _write_jsonl(path, ".xz", lzma.compress),
    "jsonl.zst": lambda path: _write_jsonl(path, ".zst", _zstandard),
    "parquet": _write_parquet,
    "dataset": _write_dataset,
    "dataset with splits": _write_dataset_splits,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_texts(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path / "data")
    check_readable(path)
    texts = [document.text for document in read_documents(path, text_field="text")]
    # a folder of .txt is read in the order of its paths: part0/0, part2/2, sub/1, sub/3
    assert texts == ([TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[3]] if kind == "txt" else TEXTS)


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "txt.zst"])
def test_single_text_file_is_one_document(kind: str, tmp_path: Path) -> None:
    data = "Gr\u00f6\u00dfe\r\nnext".encode()
    file = tmp_path / f"a.{kind}"
    file.write_bytes({"txt": data, "txt.gz": gzip.compress(data), "txt.zst": _zstandard(data)}[kind])
    (document,) = read_documents(file, text_field="text")
    assert document.text == "Gr\u00f6\u00dfe\r\nnext"


def test_frames_of_zstandard_after_each_other_are_all_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(b"".join(_zstandard(_jsonl([text])) for text in TEXTS))
    assert [document.text for document in read_documents(file, text_field="text")] == TEXTS


def test_text_field_has_the_name_that_the_user_gives(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(_jsonl(TEXTS, "content"))
    assert [document.text for document in read_documents(file, text_field="content")] == TEXTS


def test_blank_lines_blank_texts_byte_order_marks_and_hidden_files_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": " \\n"}\n{"text": "two"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / ".hidden.txt").write_text("never")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "d.txt").write_text("never")
    assert [document.text for document in read_documents(tmp_path, text_field="text")] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n["two"]\n', r"a\.jsonl, line 2: holds list"),
        ("a.jsonl", b'{"text": "one"}\n{"body": "two", "id": 3}\n', r"line 2: no field 'text', only 'body', 'id'"),
        ("a.jsonl", b'{"text": "one"}\n{"text": null}\n', r"line 2: field 'text' holds NoneType"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xe4"}\n', r"a\.jsonl, line 2: byte 0xe4 is not UTF-8"),
        ("a.txt", b"one\ntwo\nthr\xffee", r"a\.txt, line 3: byte 0xff is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(_jsonl(TEXTS))[:-30], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.bz2", bz2.compress(_jsonl(TEXTS))[:-30], r"a\.jsonl\.bz2 cannot be read"),
        ("a.jsonl.xz", lzma.compress(_jsonl(TEXTS))[:-30], r"a\.jsonl\.xz cannot be read"),
        ("a.jsonl.xz", b"no xz at all", r"a\.jsonl\.xz cannot be read"),
        ("a.jsonl.zst", _zstandard(_jsonl(TEXTS))[:-30], r"a\.jsonl\.zst cannot be read"),
        ("a.jsonl.zst", b"no zstandard", r"a\.jsonl\.zst cannot be read"),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet cannot be read"),
    ],
)
def test_bad_file_is_named_with_its_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path, text_field="text"))


def test_half_of_a_surrogate_pair_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "ab\\ud800"}\n')
    documents = list(read_documents(tmp_path, text_field="text"))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: character 2"):
        _ = documents[1].data


def test_missing_column_and_missing_text_of_parquet_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one"]}), file)
    with pytest.raises(ValueError, match=r"a\.parquet: no field 'text', only 'body'"):
        list(read_documents(file, text_field="text"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), file)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: field 'text' holds NoneType"):
        list(read_documents(file, text_field="text"))


def test_dataset_without_a_training_split_asks_for_one(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"left": part, "right": part}).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="splits left, right; point at one"):
        list(read_documents(tmp_path / "data", text_field="text"))
    (document,) = read_documents(tmp_path / "data" / "right", text_field="text")
    assert document.text == "one"


def test_dataset_folder_without_the_library_names_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r'pip install "moe-train\[datasets\]"'):
        check_readable(tmp_path)


def test_path_that_is_missing_of_another_kind_or_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        check_readable(tmp_path / "nowhere")
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"a\.pdf has a format that cannot be read; readable are \.txt"):
        check_readable(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="holds no file that can be read"):
        check_readable(tmp_path)
