"""The trained tokenizer gives back any text exactly and is an ordinary Hugging Face tokenizer."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moe.data.store import PreparedData
from moe.data.tokenizer import END, PADDING, TextEncoder, load_tokenizer, train_tokenizer

ODD = [
    "",
    " ",
    "\n\n\t  x \r\n",
    "\0\x01\x7f",
    "a\u0301 combined, \u00e1 composed",
    "\u6f22\u5b57 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u2028\u200b\ufeff\U0010ffff",
    f"names of special tokens: {END} {PADDING}",
    "007 1234567890 -3.14",
    "    def f(x):\n        return x  # two  spaces\n",
]

TEXTS = ["the cat sat on the mat, said the man. " * 50, "x = f(1, 2345)\n" * 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, vocab_size=270, folder=folder)
    return folder


def test_any_text_comes_back_from_its_ids(builtin_data: PreparedData) -> None:
    encoder, tokenizer = TextEncoder(builtin_data.tokenizer_dir), load_tokenizer(builtin_data.tokenizer_dir)

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    @example("".join(ODD))
    def check(text: str) -> None:
        (ids,) = encoder.encode([text])
        assert tokenizer.decode(ids[:-1]) == text
        assert ids[-1] == builtin_data.eos_token_id
        assert max(ids) < builtin_data.vocab_size

    check()


@pytest.mark.parametrize("text", ODD)
def test_odd_text_comes_back_from_its_ids(text: str, folder: Path) -> None:
    (ids,) = TextEncoder(folder).encode([text])
    assert load_tokenizer(folder).decode(ids[:-1]) == text


def test_name_of_a_special_token_in_a_text_is_plain_text(folder: Path) -> None:
    encoder = TextEncoder(folder)
    (ids,) = encoder.encode([f"a{END}b{PADDING}"])
    assert ids.count(encoder.eos_token_id) == 1
    assert ids[-1] == encoder.eos_token_id
    assert load_tokenizer(folder).pad_token_id not in ids


def test_saved_tokenizer_loads_as_an_ordinary_one_with_all_special_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (END, END, PADDING)
    assert len(tokenizer) == TextEncoder(folder).vocab_size == 270
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_digits_stay_single_and_words_do_not(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer("2345")["input_ids"]) == 4
    assert len(tokenizer(" the")["input_ids"]) == 1


def test_training_twice_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, vocab_size=270, folder=tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_little_text_gives_a_small_vocabulary(tmp_path: Path) -> None:
    train_tokenizer(["ab"], vocab_size=5000, folder=tmp_path)
    assert TextEncoder(tmp_path).vocab_size == 259  # 256 bytes, two special tokens, and "ab"


def test_tokenizer_without_an_end_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no eos_token"):
        TextEncoder(tmp_path)


def test_folder_that_holds_no_working_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"tokenizer in {tmp_path} does not load"):
        load_tokenizer(tmp_path)
