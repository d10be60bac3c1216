"""Tracker: where a run's figures go. metrics.jsonl is the record of truth; wandb mirrors it when asked for.

A row is one JSON object with at least `step`, written and flushed at once. Only rank 0 writes. wandb works offline
without a network or a key, and can never stop a run.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Mirror of metrics.jsonl. Online needs WANDB_API_KEY; without it the mirror stays offline."""

    __pydantic_config__ = {"extra": "forbid"}

    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "moe-train"


class Tracker:
    """Writes rows to `run_dir`/metrics.jsonl and mirrors them."""

    def __init__(self, run_dir: Path, *, config: TrackerConfig, name: str, recipe: dict[str, Any]) -> None:
        self._file = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")
        self._mirror = _start_mirror(run_dir, config, name, recipe) if config.wandb != "off" else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row. A figure that is not finite is written as null, since JSON has no NaN."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            try:
                self._mirror.log(dict(row))
            except Exception as error:  # noqa: BLE001 - whatever the mirror raises, the run goes on
                logger.warning("wandb stopped taking rows (%s); metrics.jsonl goes on", error)
                self._mirror = None

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._mirror is not None:
            self._mirror.finish()


def _start_mirror(run_dir: Path, config: TrackerConfig, name: str, recipe: dict[str, Any]) -> Any:
    import wandb  # takes 0.8 s, which only a mirrored run should pay

    modes: list[Literal["online", "offline"]] = ["online", "offline"] if config.wandb == "online" else ["offline"]
    if config.wandb == "online" and "WANDB_API_KEY" not in os.environ:
        # asked for a key it does not have, wandb would wait for one on a terminal
        logger.warning("tracker.wandb = online, but WANDB_API_KEY is not set; mirroring offline")
        modes = ["offline"]
    for mode in modes:
        try:
            run = wandb.init(
                mode=mode,
                dir=run_dir,
                project=config.project,
                id=name,
                name=name,
                resume="allow",
                config=recipe,
                settings=wandb.Settings(x_disable_stats=True, console="off", silent=True, init_timeout=20),
            )
            run.define_metric("*", step_metric="step")
            return run
        except Exception as error:  # noqa: BLE001 - no key, no network, a broken installation: never the run's end
            logger.warning("wandb %s failed (%s)", mode, error)
    logger.warning("no wandb mirror; metrics.jsonl has every row")
    return None
