"""What the extension was built for, which setup.py has recorded, and the command that builds it anew."""

import json
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# {"torch": its version, "native": why it did not build, "cuda": the same}
RECORD = Path(__file__).parents[1] / "_built.json"


@cache
def record() -> dict[str, str]:
    """What is recorded; nothing for a checkout that was not installed."""
    told: dict[str, str] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return told


def failure(backend: str) -> str:
    """Why a backend was not built, and what to do, or ""."""
    why = record().get(backend, "")
    return f"{why}; mend that, and then: {command()}" if why else ""


def objection() -> str:
    """Why the extension is not for this environment, or "". Loading one that was built for another torch may crash."""
    if why := failure("native"):
        return f"the C++ extension was not built ({why})"
    then, now = (_minor(version) for version in (record().get("torch", ""), torch.__version__))
    return f"the C++ extension was built for torch {then}, and this is torch {now}; build it anew: {command()}" * (
        bool(then) and then != now
    )


def command() -> str:
    """What builds and installs the package anew from where it came. Torch stays as it is."""
    return f"pip install --force-reinstall --no-deps --no-cache-dir {_source()}"


def warn_if_unusable() -> None:
    """Warns if an installed extension cannot be used, since the reference backend is many times slower."""
    if reason := objection():
        warnings.warn(
            f"robustft_kernels: the slow reference backend serves the CPU: {reason}", RuntimeWarning, stacklevel=3
        )


def _minor(version: str) -> str:
    return ".".join(version.partition("+")[0].split(".")[:2])


def _source() -> str:
    try:
        text = metadata.distribution("robustft_kernels").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return f"-e {RECORD.parents[1]}"
    told: dict[str, Any] = json.loads(text or "{}")
    url = str(told.get("url", "robustft_kernels"))
    if "vcs_info" in told:
        return f"'{told['vcs_info']['vcs']}+{url}@{told['vcs_info']['commit_id']}'"
    editable = bool(told.get("dir_info", {}).get("editable"))
    return "-e " * editable + url.removeprefix("file://")
