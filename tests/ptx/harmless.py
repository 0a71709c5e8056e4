"""Races inside one program that do no harm, and why.

A scalar is counted on. All threads of a program load it, and the first one stores a new value there. Another thread
may come late and load that. It makes nothing of it: what it has loaded goes into the value to be stored alone, and it
does not store. What reads the place later has a barrier before it, or is another launch.

The scale of a block of 8-bit moments is replaced. Its threads load the old scale, and the first one stores a new one.
That is made of the largest new moment of the block. So what each of them has loaded goes into the value to be stored,
and all loads come before it.
"""

import ast
import re
from functools import cache
from pathlib import Path

from robustft_kernels.triton_kernels import sweeps

PLACE = r"(\w+\.py):(\d+)(?: from (\d+))? [\w.:]+ \((read|write)\)"
RACE = re.compile(rf"race: {PLACE} with {PLACE}, threads of one program")
FUNCTIONS = {
    "count_step": "the step count and one more",
    "count_where": "how often something happened, and perhaps one more",
    "conclude": "the learned radius, brought under the largest row",
}


def harmful(seen: list[str]) -> list[str]:
    """What was seen, without those races."""
    return [line for line in seen if not _harmless(line)]


def _harmless(line: str) -> bool:
    match = RACE.fullmatch(line)
    if not match:
        return False
    one, other = match.groups()[:4], match.groups()[4:]
    read, write = (one, other) if one[3] == "read" else (other, one)
    if (read[3], write[3]) != ("read", "write") or read[0] != write[0]:
        return False
    if _of_scales(*read[:2], "load_coded") and _of_scales(*write[:2], "store_coded"):
        return True
    near = any(abs(int(number) - int(write[1])) <= 1 for number in read[1:3] if number)
    return near and function_at(write[0], int(write[1])) in FUNCTIONS


def _of_scales(file: str, line: str, function: str) -> bool:
    """Whether a line of that function accesses scales, and not codes."""
    if function_at(file, int(line)) != function:
        return False
    return "scales" in _path(file).read_text().splitlines()[int(line) - 1]


def _path(file: str) -> Path:
    return Path(sweeps.__file__).with_name(file)


@cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    path = _path(file)
    tree = ast.parse(path.read_text() if path.exists() else "")  # some lines are Triton's own
    return [(of.lineno, of.end_lineno or 0, of.name) for of in tree.body if isinstance(of, ast.FunctionDef)]


def function_at(file: str, line: int) -> str:
    """The function of a kernel's source that this line is in."""
    return next((name for first, last, name in _functions(file) if first <= line <= last), "")
