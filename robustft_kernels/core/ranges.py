"""The ranges of numbers that a user gives. There is one check, and one way to say what is allowed."""

from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`. nan is in no range.

    above, below: whether that end itself is left out.
    finite: whether infinity is left out.
    """

    low: float = 0
    high: float = inf
    above: bool = False
    below: bool = False
    finite: bool = True

    def __contains__(self, value: float) -> bool:
        high_enough = value > self.low if self.above else value >= self.low
        low_enough = value < self.high if self.below else value <= self.high
        return high_enough and low_enough and (isfinite(value) or not self.finite)

    def __str__(self) -> str:
        if self.high < inf:
            return f"in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"
        return f"{'finite and ' if self.finite else ''}{'above' if self.above else 'at least'} {self.low}"


NOT_NEGATIVE = Range()
POSITIVE = Range(above=True)
FROM_0_TO_1 = Range(high=1)
BELOW_1 = Range(high=1, below=True)
FINITE = Range(low=-inf)


def check_number(name: str, value: Any, within: Range, needed_by: str = "", *, read: bool = True) -> None:
    """Raises ValueError naming the argument if `value` is not one number of the range, TypeError if it is no number.

    needed_by: what needs the number. The message says so if `value` is None.
    read: whether to read a tensor, which makes the host wait.
    """
    if value is None and needed_by:
        raise ValueError(f"{needed_by} needs {name}, {within}")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
        if not read:
            return
        value = float(value)
    allowed = "finite" if within is FINITE else within
    if value is None:
        raise ValueError(f"{name} must be {allowed}, got None")
    if isinstance(value, str):
        raise TypeError(
            f"{name} must be a number, got the text {value!r}; convert it by float(). (YAML takes 1e-3 for text, and "
            "1.0e-3 for a number.)"
        )
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be one number, got a {type(value).__name__}")
    if value not in within:
        raise ValueError(f"{name} must be {allowed}, got {value}")
