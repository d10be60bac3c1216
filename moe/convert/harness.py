"""EleutherAI's lm-evaluation-harness on a model of ours: the home of the package lm_eval, an optional one.

Tasks are YAML files in the harness's own format. Those that come with the harness are not known by name here, as they
fetch their data; a file of one's own says where its data is, and `dataset_path: json` with local `data_files` fetches
nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.convert.modeling import to_transformers
from moe.data.tokenizer import load_tokenizer
from moe.model import Model

INSTALL = 'pip install "moe-train[lm-eval]"'


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """What the harness found."""

    table: str  # Markdown
    json: str  # everything it reports, task configurations and versions included


def run_harness(model: Model, tokenizer_dir: Path, tasks: Sequence[Path], *, batch_size: int = 8) -> HarnessResult:
    """Return what the harness makes of a model, as it makes it of the model's export.

    Args:
        tokenizer_dir: folder of the tokenizer that the model was trained with.
        tasks: YAML files, a task or a group each.
        batch_size: requests at once.

    Raises:
        ValueError: a file that is no task, or a tokenizer that does not load.
        ImportError: the harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore
        from lm_eval.models.huggingface import HFLM  # pyright: ignore
        from lm_eval.tasks import TaskManager  # pyright: ignore
        from lm_eval.utils import handle_non_serializable, make_table  # pyright: ignore
    except ImportError as error:
        raise ImportError(f"lm-evaluation-harness cannot be imported ({error}): {INSTALL}") from error
    for task in tasks:
        if not task.is_file():
            raise ValueError(f"{task} does not exist; --lm-eval takes YAML files of tasks, not their names")
    wrapped: Any = HFLM(
        pretrained=to_transformers(model),
        tokenizer=load_tokenizer(tokenizer_dir),
        backend="causal",
        batch_size=batch_size,
    )
    results = simple_evaluate(
        model=wrapped,
        tasks=[str(task) for task in tasks],
        task_manager=TaskManager(include_defaults=False),
        log_samples=False,
    )
    tables = [make_table(results), *([make_table(results, "groups")] if results.get("groups") else [])]
    text = json.dumps(results, indent=2, default=handle_non_serializable)
    return HarnessResult(table="\n".join(tables), json=text)
