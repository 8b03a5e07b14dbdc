"""What a run ran on: versions, the commit of pyvlm, the machine."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyvlm
from pyvlm._build_info import build_info


def describe_start(step: int, processes: int = 1) -> dict[str, Any]:
    """The facts of one start of a run.

    Args:
        step: steps that were done before.
        processes: how many train together.
    """
    facts = build_info()
    return {
        "step": step,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "versions": facts["versions"],
        "machine": {
            "name": platform.node(),
            "system": platform.platform(),
            "cpu": facts["cpu"],
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "cuda": facts["cuda"],
        },
        "native": facts["native"],
        "processes": processes,
    }


def commit() -> str | None:
    """The git commit that pyvlm runs from, "+changes" where files differ from it; None outside a checkout."""
    root = Path(pyvlm.__file__).parents[1]
    if not (root / ".git").exists():  # a checkout around site-packages is another project's
        return None
    try:
        sha = _git(root, "rev-parse", "HEAD")
        return sha + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
