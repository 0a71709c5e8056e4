"""What tests and benchmarks share: cases to step, streams of gradients, tolerances."""

from .cases import CASES, CHUNK, DTYPES, LEAN_CASES, ROW_CASES, SETTINGS, Case, Settings
from .stepper import Stepper
from .tolerances import assert_same_step, ulp

__all__ = [
    "CASES", "CHUNK", "DTYPES", "LEAN_CASES", "ROW_CASES", "SETTINGS", "Case", "Settings",
    "Stepper", "assert_same_step", "ulp",
]  # fmt: skip
