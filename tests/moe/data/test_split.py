"""The held-out split: whole documents, no text on both sides, the same for the same texts in any order."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe.data.documents import Document, TokenDocument
from moe.data.split import Split, plan_split


def _documents(texts: list[str]) -> Iterator[Document]:
    return (Document(name=str(index), text=text) for index, text in enumerate(texts))


def _held_out(split: Split, texts: list[str]) -> list[bool]:
    return [is_held_out for document in _documents(texts) for is_held_out, _ in split.parts(document)]


def _texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"document {index} " + "word " * draw.randint(1, 400) for index in range(count)]


def test_split_holds_out_nearly_the_share_asked_for() -> None:
    texts = _texts(400)
    for fraction in (0.01, 0.05, 0.3, 0.5):
        split = plan_split(_documents(texts), fraction, where="here")
        held_out = sum(len(text) for text, out in zip(texts, _held_out(split, texts), strict=True) if out)
        total = sum(map(len, texts))
        assert 0.98 * fraction <= held_out / total <= fraction


def test_duplicates_and_texts_that_differ_in_white_space_stay_on_one_side() -> None:
    texts = _texts(60)
    copies = texts + [text.replace(" ", "\n  ") for text in texts] + texts
    held_out = _held_out(plan_split(_documents(copies), 0.2, where="here"), copies)
    assert held_out[:60] == held_out[60:120] == held_out[120:]
    assert 0 < sum(held_out) < len(copies)


def test_split_does_not_depend_on_the_order_or_names_of_documents() -> None:
    texts = _texts(100)
    shuffled = random.Random(1).sample(texts, len(texts))
    side = dict(zip(texts, _held_out(plan_split(_documents(texts), 0.1, where="here"), texts), strict=True))
    again = _held_out(plan_split(_documents(shuffled), 0.1, where="here"), shuffled)
    assert again == [side[text] for text in shuffled]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("ab \n", min_size=1, max_size=5).filter(str.strip), min_size=2, max_size=12), st.floats(0.01, 0.5)
)
def test_both_sides_hold_something_and_share_nothing(texts: list[str], fraction: float) -> None:
    assume(len({" ".join(text.split()) for text in texts}) > 1)
    held_out = _held_out(plan_split(_documents(texts), fraction, where="here"), texts)
    sides = [
        {" ".join(text.split()) for text, out in zip(texts, held_out, strict=True) if out == side}
        for side in (False, True)
    ]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_large_documents_do_not_swell_the_held_out_part() -> None:
    texts = [*_texts(50), "large " * 100_000]
    held_out = _held_out(plan_split(_documents(texts), 0.05, where="here"), texts)
    assert not held_out[-1]
    assert any(held_out)


def test_end_of_a_single_document_is_held_out_from_a_line_end_on() -> None:
    text = "".join(f"line {index}\n" for index in range(1000))
    split = plan_split(_documents([text]), 0.1, where="here")
    (first, head), (second, tail) = split.parts(Document(name="0", text=text))
    assert split.is_cut
    assert (first, second) == (False, True)
    assert isinstance(head, Document)
    assert isinstance(tail, Document)
    assert head.text + tail.text == text
    assert head.text.endswith("\n")
    assert 0.09 * len(text) <= len(tail.text) <= 0.1 * len(text)


def test_end_of_a_single_line_and_of_single_token_document_is_held_out() -> None:
    line = Document(name="0", text="a" * 100)
    assert [len(part.data) for _, part in plan_split(iter([line]), 0.1, where="here").parts(line)] == [90, 10]
    ids = TokenDocument(name="0", token_N=np.arange(100))
    parts = [part for _, part in plan_split(iter([ids]), 0.1, where="here").parts(ids)]
    assert [part.token_N.tolist() for part in parts if isinstance(part, TokenDocument)] == [
        list(range(90)),
        list(range(90, 100)),
    ]


def test_source_without_two_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="novels is empty"):
        plan_split(iter([]), 0.1, where="novels")
    with pytest.raises(ValueError, match="novels holds the same document 3 times"):
        plan_split(_documents(["one two", "one  two", "one two\n"]), 0.1, where="novels")
    with pytest.raises(ValueError, match="too short to hold out"):
        plan_split(_documents(["ab"]), 0.1, where="novels")
