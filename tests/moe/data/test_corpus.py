"""The built-in text: docstrings cut cleanly, prose that is prose, the same documents every time."""

import ast
import dataclasses
import hashlib
import json.decoder
import textwrap
from pathlib import Path

import pytest

from moe.data import corpus
from moe.data.corpus import BUILTINS, builtin_documents, package_folder, prose_paragraphs, without_docstrings


class _DropDocstrings(ast.NodeTransformer):
    """The reference: drops docstrings from the tree instead of from the text."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, owners) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
        return node


def _tree_without_docstrings(source: str) -> str:
    return ast.dump(_DropDocstrings().visit(ast.parse(source)))


ODD = '''"""Module,
two lines."""
import os; x = "kept"
class Empty:
    """Only this."""
class M\u00fcller:
    def \u00f6(self): return 1
    async def f(self):
        # a comment stays
        """Later."""
        if x:
            def inner():
                r"""Raw \\d."""
                return """kept"""
        try:
            pass
        except OSError:
            class Deep:
                "single quotes"
                y = 1
        return "\u00e4"
'''


@pytest.mark.parametrize(
    "source",
    [ODD, *(Path(str(module.__file__)).read_text() for module in (json.decoder, dataclasses, textwrap, ast, hashlib))],
    ids=["odd", "json", "dataclasses", "textwrap", "ast", "hashlib"],
)
def test_source_without_docstrings_is_the_same_program(source: str) -> None:
    cut = without_docstrings(source)
    assert cut is not None
    assert ast.dump(ast.parse(cut)) == _tree_without_docstrings(source)
    assert len(cut) < len(source)


def test_comments_stay_and_docstrings_go() -> None:
    cut = without_docstrings(ODD)
    assert cut is not None
    assert "# a comment stays" in cut
    assert "Only this" not in cut
    assert "Raw" not in cut


def test_docstring_that_shares_its_line_with_code_is_left_alone() -> None:
    source = 'def f(): "text"\ndef g():\n    "text"; return 1\n'
    assert without_docstrings(source) == source


def test_source_that_does_not_parse_is_left_out() -> None:
    assert without_docstrings("def f(:\n") is None
    assert list(prose_paragraphs("def f(:\n")) == []


def test_prose_keeps_sentences_and_drops_tables_signatures_and_headings() -> None:
    sentence = "This is one long and quiet sentence that\n    says nothing of importance but has many words."
    source = f'''
def f():
    """Short heading.

    {sentence}

    >>> f(1, 2, 3), f(4, 5, 6), f(7, 8, 9), f(1), f(2), f(3), f(4), f(5), f(6)

    a | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11 | 12 | 13
    """
'''
    assert list(prose_paragraphs(source)) == [" ".join(sentence.split())]


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_built_in_domain_is_the_same_twice_and_fills_its_budget(name: str) -> None:
    first = builtin_documents(name, 40_000)
    second = builtin_documents(name, 40_000)
    assert [(document.name, document.text) for document in first] == [
        (document.name, document.text) for document in second
    ]
    size = sum(len(document.data) for document in first)
    assert 40_000 <= size < 40_000 + len(first[-1].data)
    assert len({" ".join(document.text.split()) for document in first}) == len(first)


def test_larger_budget_begins_with_the_documents_of_the_smaller() -> None:
    small, large = builtin_documents("maths", 10_000), builtin_documents("maths", 30_000)
    assert [document.text for document in large[: len(small)]] == [document.text for document in small]


def test_python_domain_holds_no_docstring() -> None:
    for document in builtin_documents("python", 60_000):
        for node in ast.walk(ast.parse(document.text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                assert ast.get_docstring(node) is None, document.name


def test_generated_and_repetitive_headers_stay_out_of_cpp() -> None:
    names = [document.name for document in builtin_documents("cpp", 60_000)]
    assert names
    assert not any("/ops/" in name for name in names)


def test_missing_package_is_named() -> None:
    with pytest.raises(ValueError, match="pip install no_such_package"):
        package_folder("no_such_package")


def test_domain_without_files_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus, "_standard_library", lambda: tmp_path)
    with pytest.raises(ValueError, match="builtin:python found no files"):
        builtin_documents("python", 1000)
