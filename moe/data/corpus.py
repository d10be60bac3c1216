"""The built-in text: code and prose that every installation has on disk, and generated mathematics.

Nothing is downloaded and nothing is imported: files are found beside the installed packages and only read.
The four domains are far apart (the divergence of their character trigrams is 3 to 50 times that of two halves
of one domain), so experts have something to specialise in. Files are visited in the order of a hash of their
path: any budget is a fair sample of the whole tree, the same on every run. The text of `python`, `prose` and
`cpp` depends on the installed versions; that of `maths` never changes.
"""

import ast
import hashlib
import importlib.util
import inspect
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.data.documents import Document
from moe.data.maths import maths_documents

GENERATOR_VERSION = 1  # raise it whenever the text of a built-in domain changes: caches are keyed by it
SMALLEST_FILE = 400  # bytes; what is shorter only re-exports names
LARGEST_FILE = 100_000  # bytes; what is longer is a generated table, and would fill a domain alone
# tests are repetitive, encodings and pydoc_data hold tables, ATen/ops 7000 generated headers of one pattern
SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "encodings", "pydoc_data", "ops", "site-packages", "dist-packages"]
)
MIN_WORDS = 12  # of a paragraph of prose; what is shorter is a heading or a signature
MIN_LETTERS = 0.88  # share of letters among the visible characters; below it stands a table or a formula

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True, slots=True)
class Builtin:
    """A built-in domain: where its text comes from, under what licence, and the documents in their order."""

    source: str
    licence: str
    documents: Callable[[], Iterator[Document]]
    reads_standard_library: bool = False
    packages: tuple[str, ...] = ()  # whose files are read


def builtin_documents(name: str, num_bytes: int) -> list[Document]:
    """Return the first distinct documents of a built-in domain that fill `num_bytes` of UTF-8.

    The list is shorter where the installed files hold no more. Raises ValueError if they hold nothing.
    """
    documents: dict[bytes, Document] = {}
    total = 0
    for document in BUILTINS[name].documents():
        if document.key in documents:
            continue
        documents[document.key] = document
        total += len(document.data)
        if total >= num_bytes:
            return list(documents.values())
    if not documents:
        raise ValueError(f"builtin:{name} found no files: {BUILTINS[name].source}; choose other data.sources")
    return list(documents.values())


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it. Raises ValueError if it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"built-in text is read from the package {name!r}: pip install {name}")
    return Path(spec.origin).parent


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(roots: Sequence[Path], suffixes: tuple[str, ...]) -> Iterator[Document]:
    """Yield the source files under `roots` that are UTF-8 and of a fair size, in order of hashed path."""
    found: list[tuple[bytes, str, Path]] = []
    for root in roots:
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            for path in (Path(folder, name) for name in files if name.endswith(suffixes)):
                if SMALLEST_FILE <= path.stat().st_size <= LARGEST_FILE:
                    name = f"{root.name}/{path.relative_to(root).as_posix()}"
                    found.append((hashlib.sha256(name.encode()).digest(), name, path))
    for _, name, path in sorted(found):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue  # a few sources keep another encoding; a corpus of UTF-8 does without them
        yield Document(name=name, text=text)


def _parse(text: str) -> ast.Module | None:
    """Return the syntax tree, or None for a file that this Python cannot read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None


def _docstrings(node: ast.AST) -> Iterator[tuple[Documented, ast.Expr, str]]:
    """Yield (owner, statement, text) of every docstring at or below a statement, in the order of the file."""
    if isinstance(node, Documented) and node.body:
        match node.body[0]:
            case ast.Expr(value=ast.Constant(value=str(text))) as statement:
                yield node, statement, text
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):  # expressions hold none: 3x faster
        for child in getattr(node, block, ()):
            yield from _docstrings(child)


def without_docstrings(text: str) -> str | None:
    """Return Python source with its docstrings cut out, or None if it does not parse.

    Docstrings belong to the prose domain: left here, a text could train in one and be held out in the other.
    """
    tree = _parse(text)
    if tree is None:
        return None
    lines = text.encode().split(b"\n")  # bytes, because the columns of a syntax tree count bytes
    dropped: set[int] = set()
    for node, statement, _ in _docstrings(tree):
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
        if before.strip() or after.strip():
            continue  # `def f(): "text"`, where the line holds more than the docstring
        dropped.update(range(first, last + 1))
        if len(node.body) == 1 and not isinstance(node, ast.Module):
            lines[first] = before + b"pass"
            dropped.discard(first)
    kept = [line for number, line in enumerate(lines) if number not in dropped]
    return b"\n".join(kept).strip(b"\n").decode() + "\n"


def _python_documents() -> Iterator[Document]:
    for document in _files([_standard_library()], (".py",)):
        # _sysconfigdata names the compiler and the folders of this very machine
        if "_sysconfigdata" not in document.name and (text := without_docstrings(document.text)):
            yield Document(name=document.name, text=text)


def prose_paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of running English in the docstrings of Python source, one line each."""
    tree = _parse(text)
    for _, _, docstring in _docstrings(tree) if tree else ():
        for block in inspect.cleandoc(docstring).split("\n\n"):
            words = block.split()
            visible = "".join(words)
            if len(words) >= MIN_WORDS and sum(map(str.isalpha, visible)) >= MIN_LETTERS * len(visible):
                yield " ".join(words)


def _prose_documents() -> Iterator[Document]:
    """Yield one document for each source file: those of its paragraphs that no file before it had."""
    seen: set[str] = set()
    for document in _files([_standard_library(), package_folder("numpy"), package_folder("sympy")], (".py",)):
        fresh = [text for text in dict.fromkeys(prose_paragraphs(document.text)) if text not in seen]
        seen.update(fresh)
        if fresh:
            yield Document(name=document.name, text="\n\n".join(fresh) + "\n")


def _cpp_documents() -> Iterator[Document]:
    include = package_folder("torch") / "include"
    return _files([include / folder for folder in ("ATen", "c10", "torch")], (".h", ".hpp", ".cuh"))


BUILTINS = {
    "python": Builtin(
        source="the Python files of this interpreter's standard library, docstrings cut out",
        licence="PSF-2.0",
        documents=_python_documents,
        reads_standard_library=True,
    ),
    "prose": Builtin(
        source="docstring paragraphs of the standard library, numpy and sympy",
        licence="PSF-2.0 AND BSD-3-Clause",
        documents=_prose_documents,
        reads_standard_library=True,
        packages=("numpy", "sympy"),
    ),
    "maths": Builtin(
        source="generated exercises with their solutions (moe/data/maths.py)",
        licence="Apache-2.0",
        documents=maths_documents,
    ),
    "cpp": Builtin(
        source="the C++ headers of PyTorch in torch/include",
        licence="BSD-3-Clause",
        documents=_cpp_documents,
        packages=("torch",),
    ),
}
