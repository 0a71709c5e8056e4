"""What is stepped in tests and benchmarks: tensors of every kind, and settings of the bases."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.bases import ADAMW, SGD, Base
from ..core.eight_bit import EIGHT_BIT

CHUNK = 16384
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)


def _second_first(t: Tensor) -> Tensor:
    """Dimension 0 lies inside of dimension 1, so a row is in several runs."""
    return t.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def _channels_last(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.channels_last)


def misaligned(t: Tensor) -> Tensor:
    """One element off the allocator's alignment."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)


@dataclass(frozen=True)
class Case:
    """A tensor to step: its shape, and how it lies in memory."""

    name: str
    shape: tuple[int, ...]
    lay: Callable[[Tensor], Tensor] = torch.clone


# Sizes for a vector path, its tail, a block, a chunk and several chunks. Every number of dimensions from 0 to 5.
CASES = (
    Case("0-d", ()),
    Case("empty", (0,)),
    Case("empty matrix", (3, 0)),
    Case("1", (1,)),
    Case("3", (3,)),
    Case("4k-1", (4 * 16 - 1,)),
    Case("4k+1", (4 * 16 + 1,)),
    Case("tile, block and tail", (1024 + 64 + 17,)),
    Case("one chunk", (CHUNK,)),
    Case("chunk and 1", (CHUNK + 1,)),
    Case("two chunks and 1", (2 * CHUNK + 1,)),
    Case("several chunks", (5 * CHUNK + 333,)),
    Case("matrix", (257, 129)),
    Case("transposed", (211, 173), _transposed),
    Case("misaligned", (3 * CHUNK + 5,), misaligned),
    Case("misaligned matrix", (37, 96), misaligned),
    Case("conv", (32, 16, 3, 3)),
    Case("channels_last", (40, 32, 9, 7), _channels_last),
    Case("5-d", (2, 3, 4, 5, 6)),
)

# The same in 17 chunks instead of 38, for a backend that takes long: Triton's interpreter.
LEAN_CASES = (
    Case("0-d", ()),
    Case("empty matrix", (3, 0)),
    Case("3", (3,)),
    Case("tile, block and tail", (1024 + 64 + 17,)),
    Case("chunk and 1", (CHUNK + 1,)),
    Case("several chunks", (3 * CHUNK + 333,)),
    Case("misaligned", (2 * CHUNK + 5,), misaligned),
    Case("misaligned matrix", (9, 96), misaligned),
    Case("transposed", (131, 127), _transposed),
    Case("channels_last", (40, 8, 12, 7), _channels_last),
    Case("5-d", (2, 3, 4, 5, 6)),
)

# Kinds of rows: short and long, whole and in parts, aligned or not, contiguous or strided, one or none.
ROW_CASES = (
    *CASES,
    Case("rows of 1", (300, 1)),
    Case("rows of 9", (768, 1, 3, 3)),
    Case("rows of 37", (90, 37)),
    Case("rows of 768", (70, 768)),
    Case("rows of a chunk", (3, CHUNK)),
    Case("long rows", (3, 2 * CHUNK + 64)),
    Case("long odd rows", (2, CHUNK + 77)),
    Case("one row", (1, 5000)),
    Case("transposed long rows", (5, CHUNK + 3), _transposed),
    Case("no row", (0, 5)),
    Case("rows in runs of 37", (7, 30, 37), _second_first),
)


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a base, with the options that change its formula or what it stores."""

    name: str
    base: Base
    hyper: dict[str, float]
    state_dtype: torch.dtype | str = torch.float32

    def but(self, **hyper: float) -> "Settings":
        """The same with other hyper-parameters."""
        return replace(self, hyper={**self.hyper, **hyper})

    @property
    def stochastic(self) -> bool:
        return bool(self.hyper["stochastic_rounding"])

    def acts_on(self, dtype: torch.dtype) -> bool:
        """Whether all its options change something for weights of `dtype`."""
        masters = not self.hyper["master_weights"] or dtype in (torch.bfloat16, torch.float16)
        return masters and (not self.stochastic or dtype == torch.bfloat16)


# The radius is in the midst of the cases' norms.
_METHODS = dict(strength=1.3, radius=1.0, k=0.7, radius_lr=1.0, radius_beta1=0.9, radius_beta2=0.99)
_FLAGS = dict(maximize=0, stochastic_rounding=0, master_weights=0)


def _adamw(name: str, state_dtype: torch.dtype | str = torch.float32, **other: float) -> Settings:
    defaults = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0, amsgrad=0)
    return Settings(name, ADAMW, {**defaults, **_METHODS, **_FLAGS, **other}, state_dtype)


def _sgd(name: str, state_dtype: torch.dtype | str = torch.float32, **other: float) -> Settings:
    defaults = dict(lr=1e-2, momentum=0, dampening=0, weight_decay=0, nesterov=0)
    return Settings(name, SGD, {**defaults, **_METHODS, **_FLAGS, **other}, state_dtype)


SETTINGS = (
    _adamw("adamw"),
    _adamw("adamw, decay", weight_decay=0.1),
    _adamw("adamw, amsgrad, maximize", amsgrad=1, maximize=1),
    _sgd("sgd, decay", weight_decay=0.01),
    _sgd("sgd, momentum, dampening", momentum=0.9, dampening=0.2, weight_decay=0.01),
    _sgd("sgd, nesterov, maximize", momentum=0.9, nesterov=1, maximize=1),
    _adamw("adamw, stochastic", stochastic_rounding=1),
    _sgd("sgd, stochastic", stochastic_rounding=1),
    _adamw("adamw, amsgrad, bf16 state", torch.bfloat16, amsgrad=1, stochastic_rounding=1),
    _sgd("sgd, bf16 state, master", torch.bfloat16, momentum=0.9, master_weights=1),
    _adamw("adamw, master", master_weights=1, weight_decay=0.1),
    _adamw("adamw, amsgrad, 8-bit state", EIGHT_BIT, amsgrad=1),
    _sgd("sgd, 8-bit state, master", EIGHT_BIT, momentum=0.9, master_weights=1),
)
