"""Recipes that are more than one run, from a dense folder of transformers to their end, and again."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_folders import make_model, save

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    *("--trainer.steps", "2", "--trainer.eval-sequences", "2", "--data.builtin-bytes", "30000"),
    *("--batch.global-sequences", "2", "--batch.micro-sequences", "2", "--schedule.warmup-steps", "1"),
]


@pytest.fixture
def dense(tmp_path, prepared_data) -> Path:
    folder = save(make_model("qwen3", steps=2, intermediate_size=24, vocab_size=512), tmp_path / "dense")
    for file in (next(prepared_data.glob("prepared-*")) / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def start(script: str, dense: Path, home: Path) -> str:
    command = [sys.executable, ROOT / "recipes" / script, dense, *FLAGS]
    result = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_innovator_goes_through_its_four_stages_and_leaves_them_alone_when_they_are_finished(dense, tmp_path):
    first = start("innovator.py", dense, tmp_path)
    table = first[first.index("Loss on held-out text, in nats per token:\n") :].splitlines()[-5:]
    assert table[0].split() == ["dense", "its", "expert", "upcycled", "warmed", "up", "joint"]
    assert [row.split()[0] for row in table[1:]] == ["prose", "python", "maths", "cpp"]
    assert all(5 < float(value) < 8 for row in table[2:] for value in row.split()[1:])
    again = start("innovator.py", dense, tmp_path)
    assert again.count("is finished") == 5
    assert again.splitlines()[-5:] == table


def test_a_dense_folder_is_upcycled_trained_on_and_goes_out(dense, tmp_path):
    text = start("upcycle_dense.py", dense, tmp_path)
    assert "exact: logits equal" in text and "Qwen3MoeForCausalLM" in text and "32 greedy tokens equal" in text
    assert (tmp_path / "runs/upcycled/hf/model.safetensors").exists()
