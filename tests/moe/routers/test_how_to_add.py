"""The router in docs/how_to_add.md is the code that the page says it is: it registers, keeps every promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

DRIVER = """
import importlib.util, sys
import pytest

spec = importlib.util.spec_from_file_location("moe.routers.noisy", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "noisy", *sys.argv[2:]]))
"""


def example() -> str:
    page = (ROOT / "docs/how_to_add.md").read_text()
    (code,) = re.findall(r"<!-- example: moe/routers/noisy.py -->\n```python\n(.*?)```", page, re.S)
    return code


def test_the_router_of_the_page_keeps_every_promise(tmp_path):
    code = example()
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    (tmp_path / "noisy.py").write_text(code)
    tests = str(ROOT / "tests/moe/routers/test_properties.py")
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "noisy.py"), tests],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 40, done.stdout[-500:]
    assert " failed" not in done.stdout
