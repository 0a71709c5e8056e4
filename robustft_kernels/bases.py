"""The base optimizers as the backends see them: hyper-parameters, state, and the schema of their op."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .methods import RULES

Group = dict[str, Any]
Row = Mapping[str, Any]  # a group, or its row of hyper-parameters; with its "rule"

MEASURES = ("grad_dot_delta", "before", "gain", "selected")  # of a segment; the last counts the steps with α ≠ 1
STATE_DTYPES = (torch.float32, torch.bfloat16)  # of moments, where the arithmetic is float32
RADIUS_STATE = ("radius", "exp_avg", "exp_avg_sq")  # a learned radius, and the moments of its gradient


Draws = Callable[[Row, torch.dtype], bool]  # whether a parameter of a group and of this dtype has something


def _always(_: Row, __: torch.dtype) -> bool:
    return True


def _amsgrad(row: Row, _: torch.dtype) -> bool:
    return bool(row["amsgrad"])


def _momentum(row: Row, _: torch.dtype) -> bool:
    return bool(row["momentum"] != 0)


def _tracks(row: Row, _: torch.dtype) -> bool:
    return RULES[row["rule"]].tracks


def _learns(row: Row, _: torch.dtype) -> bool:
    return RULES[row["rule"]].learns


def _has_master(row: Row, dtype: torch.dtype) -> bool:
    return bool(row["master_weights"]) and dtype.itemsize == 2


def _sgd_counts(row: Row, dtype: torch.dtype) -> bool:
    return _momentum(row, dtype) or _tracks(row, dtype) or _stochastic(row, dtype)


def _stochastic(row: Row, _: torch.dtype) -> bool:
    return bool(row["stochastic_rounding"])


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """What a parameter of `dtype` is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moment_dtype_of(dtype: torch.dtype, state_dtype: torch.dtype) -> torch.dtype:
    """In what the moments of a parameter of `dtype` are kept: as asked, but float64 for float64."""
    return torch.float64 if dtype == torch.float64 else state_dtype


def delta_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """In what FTP keeps c: it serves as a direction, which bfloat16 gives at half the memory and with float's range."""
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


@dataclass(frozen=True)
class Base:
    """A base optimizer, as the backends see it.

    hyper: the columns of a group's row.
    state: the tensors it keeps for a parameter, and for which; the first `moments` of them are moments.
    counted: which parameters keep a step count.
    """

    name: str
    hyper: tuple[str, ...]
    state: tuple[tuple[str, Draws], ...]
    counted: Draws

    @property
    def moments(self) -> tuple[str, ...]:
        return tuple(key for key, _ in self.state[: -len(_KEPT)])

    def schema(self, overload: str) -> str:
        mutated = ["params", *(f"{key}s" for key, _ in self.state), "steps", "measures", "alphas"]
        alias = {name: f"Tensor({chr(ord('a') + i)}!)" for i, name in enumerate(mutated)}
        lists = "".join(f"{alias[f'{key}s']}[] {key}s, " for key, _ in self.state)
        return (
            f"{self.name}_.{overload}({alias['params']}[] params, Tensor[] grads, Tensor[] anchors, {lists}"
            f"{alias['steps']}[] steps, {alias['measures']} measures, {alias['alphas']} alphas, "
            "Tensor hyper, int[] group_sizes, str[] rules, int[] seeds, "
            "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
        )


# What the methods read, and flags.
_COMMON = (
    "strength", "radius", "k", "radius_lr", "radius_beta1", "radius_beta2",
    "maximize", "anchored", "stochastic_rounding", "master_weights",
)  # fmt: skip
_KEPT = (("delta", _tracks), ("radius_state", _learns), ("master", _has_master))
ADAMW = Base(
    "adamw",
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", *_COMMON),
    state=(("exp_avg", _always), ("exp_avg_sq", _always), ("max_exp_avg_sq", _amsgrad), *_KEPT),
    counted=_always,
)
SGD = Base(
    "sgd",
    hyper=("lr", "momentum", "dampening", "weight_decay", "nesterov", *_COMMON),
    state=(("momentum_buffer", _momentum), *_KEPT),
    counted=_sgd_counts,
)
# No step at all: θ̃ = θ. Gradients may be left out, and ⟨g, d⟩ is then nan. It counts nothing, but reads the
# count of the step before it.
STILL = Base("still", hyper=("lr", *_COMMON), state=(("master", _has_master),), counted=_stochastic)
BASES = (ADAMW, SGD, STILL)


def check_hyper(group: Group) -> None:
    """Raises ValueError naming the first hyper-parameter of a group that is out of its range."""
    for key in ("lr", "eps", "weight_decay", "strength", "momentum", "dampening", "radius", "k", "radius_lr"):
        if group.get(key) is None:
            continue
        if isinstance(group[key], Tensor) and group[key].numel() != 1:
            raise ValueError(f"{key} must be one number, got a tensor of shape {tuple(group[key].shape)}")
        value = float(group[key])
        if not isfinite(value) or (value < 0 and key != "dampening"):
            raise ValueError(f"{key} must be finite and at least 0, got {value}")
        if (key == "radius" and value == 0) or (key == "k" and value > 1):
            raise ValueError(f"{key} must be {'above 0' if key == 'radius' else 'in [0, 1]'}, got {value}")
    if group["state_dtype"] not in STATE_DTYPES:
        raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16, got {group['state_dtype']!r}")
    if group["method"] == "project" and group["radius"] is None:
        raise ValueError("method 'project' needs a radius: how far from its anchor a segment may go")
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], int) or not 0 <= group["seed"] < 2**31:
        raise ValueError(f"seed must be an integer of at least 0 and below 2**31, got {group['seed']!r}")
    for key in ("betas", "radius_betas"):
        for i, beta in enumerate(group.get(key, ())):
            if not 0 <= float(beta) < 1:
                raise ValueError(f"{key}[{i}] must be in [0, 1), got {float(beta)}")
        if len(group.get(key, (0, 0))) != 2:
            raise ValueError(f"{key} must be two numbers, got {group[key]}")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs a momentum above 0 and dampening=0")
