"""What the extension was built for, which setup.py has recorded, and the command that builds it anew."""

import json
import shlex
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch

# {"torch": its version, "native": why it did not build, "cuda": the same}
RECORD = Path(__file__).parents[1] / "_built.json"
PIP = "pip install --force-reinstall --no-deps --no-cache-dir"
UV = "uv pip install --reinstall --no-deps --no-cache --no-build-isolation"  # isolated, uv finds no torch


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
    """What builds and installs the package anew from where it came, with what installed it. Torch stays as it is."""
    start = UV if _installed("INSTALLER").strip() == "uv" else PIP
    return f"{start} {_source(json.loads(_installed('direct_url.json') or '{}'))}"


def warn_if_unusable() -> None:
    """Warns if an installed extension cannot be used, since the reference backend is many times slower."""
    if reason := objection():
        warnings.warn(
            f"robustft_kernels: the slow reference backend serves the CPU: {reason}", RuntimeWarning, stacklevel=3
        )


def _minor(version: str) -> str:
    return ".".join(version.partition("+")[0].split(".")[:2])


def _installed(file: str) -> str:
    """What the installer has written in a file, or ""."""
    try:
        return metadata.distribution("robustft_kernels").read_text(file) or ""
    except metadata.PackageNotFoundError:
        return ""


def _source(told: dict[str, Any]) -> str:
    url = str(told.get("url", ""))
    if "vcs_info" in told:
        return f"'{told['vcs_info']['vcs']}+{url}@{told['vcs_info']['commit_id']}'"
    checkout = RECORD.parents[1]
    if not url and (checkout / "setup.py").exists():
        return f"-e {shlex.quote(str(checkout))}"
    if not url or url.endswith(".whl"):  # the same wheel would be as unfit again
        return ". # in a clone of its sources"
    editable = bool(told.get("dir_info", {}).get("editable"))
    return "-e " * editable + (shlex.quote(unquote(url[7:])) if url.startswith("file://") else url)
