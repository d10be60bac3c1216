"""The rules of the house that a machine can hold: floors, homes of libraries, sizes, packaging, true docs.

docs/architecture.md draws the floors, CONTRIBUTING.md gives the rules in words.
"""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

from background import Background

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("moe", "kernels/moe_kernels")
PROGRAMS = ("recipes", "tests", "benchmarks")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# the only places that may import a library, anywhere in the file: the rest goes through them
HOMES = {
    "triton": ("kernels/moe_kernels/",),
    "megablocks": ("kernels/moe_kernels/backends/megablocks.py",),
    "deepspeed": ("moe/train/engine.py", "moe/train/adoption.py"),
    "transformers": ("moe/convert/", "moe/data/"),
    "wandb": ("moe/train/tracker.py",),
    "lm_eval": ("moe/convert/harness.py",),
}
MAX_LINES_PER_FILE = 400
MAX_LINES_PER_FUNCTION = 80
MAX_LINES_PER_KERNEL = 120  # a Triton kernel cannot be cut into functions without cost to its reader

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def text_files() -> list[Path]:
    single = [ROOT / name for name in ("Makefile", "pyproject.toml", ".pre-commit-config.yaml", ".ci/run")]
    return single + source_files(*PACKAGES, *PROGRAMS) + markdown_files()


def markdown_files() -> list[Path]:
    return [path for folder in ("", "docs", "kernels", "benchmarks") for path in (ROOT / folder).glob("*.md")]


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=shown(path))


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTION))


def is_kernel(function: Function) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Yield the public classes and functions of a file, and the public methods, as (dotted name, node)."""
    for node in tree.body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, FUNCTION) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member


def imported_libraries(tree: ast.Module) -> Iterator[str]:
    """Yield the top-level name of every absolute import, lazy ones and `import_module("...")` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value.split(".")[0]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "ruff", "check", "--output-format", "concise", "."),
        ("-m", "ruff", "format", "--check", "--output-format", "concise", "."),
        ("-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True))"),
    ],
    ids=["ruff_check", "ruff_format", "floors"],
)
def test_checks_of_make_lint_pass(command: tuple[str, ...]) -> None:
    result = run_python(*command, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    assert result.returncode == 0, result.stdout + result.stderr


PYRIGHT = Background(
    [sys.executable, "-m", "pyright", "--pythonpath", sys.executable],
    environment={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
)
BACKGROUND = [PYRIGHT]


def test_types_are_right() -> None:
    code, output = PYRIGHT.result(timeout_s=900)
    assert code == 0, output


def test_every_module_stands_on_a_floor() -> None:
    contract = PYPROJECT["tool"]["importlinter"]["contracts"][0]
    on_floors = {name.strip(" ()") for layer in contract["layers"] for name in re.split(r"[|:]", layer)}
    present = {f"moe.{path.stem}" for path in (ROOT / "moe").glob("*.py") if not path.stem.startswith("__")}
    present |= {f"moe.{path.parent.name}" for path in (ROOT / "moe").glob("*/__init__.py")}
    assert present <= on_floors, f"no floor in pyproject.toml for {sorted(present - on_floors)}"


def test_every_library_is_imported_only_from_its_home() -> None:
    strays = [
        f"{shown(path)} imports {library}"
        for path in source_files(*PACKAGES)
        for library in imported_libraries(parse(path))
        if library in HOMES and not shown(path).startswith(HOMES[library])
    ]
    assert not strays


def test_moe_kernels_imports_nothing_beyond_torch_and_triton() -> None:
    allowed = {"torch", "triton", "megablocks", "moe_kernels", *sys.stdlib_module_names}
    strays = [
        f"{shown(path)} imports {library}"
        for path in source_files("kernels")
        for library in imported_libraries(parse(path))
        if library not in allowed
    ]
    assert not strays


def test_importing_moe_leaves_the_heavy_libraries_alone() -> None:
    heavy = ("deepspeed", "transformers", "wandb", "datasets", "matplotlib", "lm_eval")
    code = f"import sys, moe; print(sorted(set({heavy!r}) & set(sys.modules)))"
    result = run_python("-c", code, PYTHONPATH=str(ROOT / "kernels"))
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("folder", ["kernels", *PROGRAMS])
def test_folder_of_programs_is_no_package(folder: str) -> None:
    below = [folder] if folder == "kernels" else [folder, f"{folder}/**"]
    assert not [shown(path) for pattern in below for path in ROOT.glob(f"{pattern}/__init__.py")]


def test_every_folder_of_a_package_is_a_package() -> None:
    folders = {path.parent for path in source_files(*PACKAGES)}
    assert not [shown(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_wheel_carries_only_the_two_packages() -> None:
    find = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    packages = {
        name for where in find["where"] for name in find_namespace_packages(ROOT / where, include=find["include"])
    }
    on_disk = {shown(path.parent).removeprefix("kernels/").replace("/", ".") for path in source_files(*PACKAGES)}
    assert packages == on_disk
    assert {name.split(".")[0] for name in packages} == {"moe", "moe_kernels"}


@pytest.mark.parametrize("is_kernels_installed", [False, True], ids=["without_kernels", "with_kernels"])
def test_transformers_imports_from_the_repository_root(tmp_path: Path, is_kernels_installed: bool) -> None:
    """transformers imports Hugging Face's own package `kernels` where it is: our folder must not hide it."""
    code = "import transformers.modeling_utils"
    if is_kernels_installed:
        pins = [pin for pin in importlib.metadata.requires("transformers") or [] if re.match(r"kernels\b", pin)]
        version = re.search(r">=\s*([\d.]+)", pins[0] if pins else ">=0.1").group(1)  # one that transformers accepts
        metadata = tmp_path / f"kernels-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
        package = tmp_path / "kernels" / "__init__.py"
        package.parent.mkdir()
        package.write_text(
            "class Anything:\n"
            "    def __init__(self, *args, **kwargs): pass\n"
            "    def __call__(self, decorated): return decorated\n"
            "def __getattr__(name):\n"
            "    if name.startswith('__'): raise AttributeError(name)\n"
            "    return Anything\n"
        )
        code += f"; import kernels; assert kernels.__file__ == {str(package)!r}, kernels.__file__"
    result = run_python("-c", code, PYTHONPATH=os.pathsep.join([str(ROOT / "kernels"), str(tmp_path)]))
    assert result.returncode == 0, result.stderr


def test_every_file_opens_with_a_docstring() -> None:
    assert not [shown(path) for path in source_files(*PACKAGES, *PROGRAMS) if not ast.get_docstring(parse(path))]


def test_every_public_name_says_what_it_is() -> None:
    mute = [
        f"{shown(path)}: {name}"
        for path in source_files(*PACKAGES)
        for name, node in public_definitions(parse(path))
        if "." not in name and not ast.get_docstring(node)
    ]
    assert not mute


def test_every_public_function_is_typed() -> None:
    untyped = []
    for path in source_files(*PACKAGES):
        for name, node in public_definitions(parse(path)):
            if isinstance(node, ast.ClassDef) or is_kernel(node):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
            bare += [] if node.returns else ["return"]
            untyped += [f"{shown(path)}: {name} ({', '.join(bare)})"] if bare else []
    assert not untyped


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in source_files(*PACKAGES, *PROGRAMS):
        lines = path.read_text(encoding="utf-8").count("\n")
        long += [f"{shown(path)} has {lines} lines"] if lines > MAX_LINES_PER_FILE else []
        for function in functions(parse(path)):
            limit = MAX_LINES_PER_KERNEL if is_kernel(function) else MAX_LINES_PER_FUNCTION
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            long += [f"{shown(path)}: {function.name} has {lines} lines, limit {limit}"] if lines > limit else []
    assert not long


def test_source_and_docs_are_ascii() -> None:
    assert not [shown(path) for path in text_files() if not path.read_text(encoding="utf-8").isascii()]


def test_no_path_of_one_machine_is_written_down() -> None:
    machine_path = re.compile(r"(?<![\w.~])/(work|root|home|Users|tmp|mnt|scratch)(?=/|\b)")
    found = [
        f"{shown(path)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if machine_path.search(line)
    ]
    assert not found


def commands_shown(path: Path) -> list[str]:
    """Return the lines of the fenced shell blocks of a Markdown file, without prompts."""
    blocks = re.findall(
        r"^```(?:bash|sh|console)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_commands_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [(path, line) for path in markdown_files() for line in commands_shown(path)]
    readme = " ".join(line for path, line in commands if path.name == "README.md")
    assert "make train" in readme
    assert "make test" in readme
    missing = []
    for path, line in commands:
        target = re.match(r"make ([a-z]+)", line)
        missing += [f"{shown(path)}: no make target {target[1]}"] if target and target[1] not in targets else []
        scripts = re.findall(r"\b(?:recipes|benchmarks)/\w+\.py", line)
        missing += [f"{shown(path)}: no {script}" for script in scripts if not (ROOT / script).exists()]
    assert not missing


def test_links_in_the_docs_lead_somewhere() -> None:
    dead = [
        f"{shown(path)}: {target}"
        for path in markdown_files()
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not dead


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in script[1:] if line and not line.startswith(("#", "set ", "cd "))] == ["make test"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_floors_in_the_docs_are_those_that_are_checked() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    block = re.search(r"## Floors\n.*?```text\n(.*?)```", text, re.DOTALL)
    assert block
    drawn = [re.split(r"\s{2,}", line)[0] for line in block[1].splitlines()]
    assert drawn == PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
