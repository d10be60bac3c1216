"""Which commit is measured. Without torch, for programs that must start at once."""

import os
import subprocess
from pathlib import Path


def current_commit() -> str:
    """Return the commit checked out, marked "-dirty" if files differ from it, or "none" outside a repository.

    MOE_COMMIT in the environment takes its place: a copy of the files alone, on another machine, cannot know.
    """
    named = os.environ.get("MOE_COMMIT", "")
    if named:
        return named
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        answer = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "none"
    return answer.stdout.strip() if answer.returncode == 0 else "none"
