"""Our own source files in the one form in which transformers takes code along with a model: flat, beside its weights.

What transformers copies is the file that `auto_map` names, and every file that a line `from .name import` in it leads
to (transformers.dynamic_module_utils). So moe.routers.topk becomes moe_routers_topk.py with its imports made relative,
and the first file names all others. That also fills the registries, which look for files only where there is a package.
"""

import ast
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import moe
import moe_kernels

ENTRY = "moe.convert.modeling"
ENTRY_FILE = "modeling_moe_train"
LIBRARIES = ("numpy", "pydantic", "torch", "transformers")  # what the files need, numpy as a part of transformers
# of these packages every file goes along that needs no more than that: what a model uses is known when it is loaded
REGISTRIES = ("moe.routers", "moe_kernels.backends")
_ROOTS = {"moe": moe, "moe_kernels": moe_kernels}


def flat_sources() -> dict[str, str]:
    """Return file name -> text of all that a model of ours needs, made from the package as it is installed."""
    modules = _closure(ENTRY)
    for package in REGISTRIES:
        folder = _path(package).parent
        for name in sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__"):
            needed = _closure(f"{package}.{name}")
            if all(library in LIBRARIES for module in needed for library in _read(module).libraries):
                modules |= needed
    return {f"{_flat(module)}.py": _text(module, modules) for module in sorted(modules)}


@dataclass(frozen=True, kw_only=True)
class _Import:
    """A statement `from ... import` of our own names, anywhere in a file."""

    first_line: int
    last_line: int
    modules: tuple[str, ...]
    text: str  # what it becomes, indented


@dataclass(frozen=True, kw_only=True)
class _Source:
    lines: list[str]
    docstring_end: int
    imports: list[_Import]
    libraries: set[str]  # other than Python's own


@cache
def _read(module: str) -> _Source:
    text = _path(module).read_text(encoding="utf-8")
    tree = ast.parse(text)
    imports, libraries = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module} has a relative import"
            if node.module.split(".")[0] in _ROOTS:
                imports.append(_relative(node, node.module))
            else:
                libraries.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            libraries |= {alias.name.split(".")[0] for alias in node.names}
    return _Source(
        lines=text.splitlines(),
        docstring_end=tree.body[0].end_lineno or 1,
        imports=imports,
        libraries=libraries - set(sys.stdlib_module_names),
    )


def _relative(node: ast.ImportFrom, package: str) -> _Import:
    """Return the statement with relative imports of flat files; a file of the package is a file, and no name in it."""
    files = [alias for alias in node.names if _is_file(f"{package}.{alias.name}")]
    names = [alias for alias in node.names if alias not in files]
    lines = [f"from . import {_flat(f'{package}.{alias.name}')} as {alias.asname or alias.name}" for alias in files]
    if names:
        lines.insert(0, f"from .{_flat(package)} import {', '.join(ast.unparse(alias) for alias in names)}")
    return _Import(
        first_line=node.lineno,
        last_line=node.end_lineno or node.lineno,
        modules=(*(f"{package}.{alias.name}" for alias in files), *([package] if names else [])),
        text="\n".join(" " * node.col_offset + line for line in lines),
    )


def _text(module: str, modules: set[str]) -> str:
    source = _read(module)
    lines = list(source.lines)
    for statement in sorted(source.imports, key=lambda statement: -statement.first_line):
        lines[statement.first_line - 1 : statement.last_line] = [statement.text]
    if module == ENTRY:
        others = [f"from .{_flat(other)} import __doc__ as _" for other in sorted(modules - {ENTRY})]
        lines[source.docstring_end : source.docstring_end] = [
            "",
            "# all files, for this one is what transformers reads",
        ]
        lines[source.docstring_end + 2 : source.docstring_end + 2] = others
    path = module.replace(".", "/")
    return "\n".join([f"# {path}.py of moe-train (Apache-2.0), with relative imports", *lines]) + "\n"


def _closure(module: str) -> set[str]:
    """Return a module and all of ours that it needs, inside functions too."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [needed for statement in _read(name).imports for needed in statement.modules]
    return found


def _flat(module: str) -> str:
    return ENTRY_FILE if module == ENTRY else module.replace(".", "_")


def _is_file(module: str) -> bool:
    return _path(module).is_file()


def _path(module: str) -> Path:
    """Return where a module is, or would be."""
    root, *rest = module.split(".")
    place = Path(_ROOTS[root].__path__[0]).joinpath(*rest)
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
