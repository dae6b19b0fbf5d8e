"""What a run was made with: commit and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of the code, "+" when there are uncommitted changes, "unknown" outside a checkout; or, with its name
    behind it, what PASNET_COMMIT says, for a machine that got a copy of the code and keeps it in a repository of its
    own, or in none."""
    if said := os.environ.get("PASNET_COMMIT"):
        return f"{said} (PASNET_COMMIT)"
    here = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Python's and torch's; the rest is in constraints.txt of the commit."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__}
