"""The base optimizers as the backends see them: their hyper-parameters, their state, and what a group asks of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .eight_bit import EIGHT_BIT, SCALE, dtype_of_codes, in_blocks, is_scale, shape_of_scales
from .methods import LEARNED, METHOD_HYPER, RULES, Rule, method_of, rule_of_group
from .ranges import BELOW_1, FINITE, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, check_number

Group = dict[str, Any]  # a parameter group, as torch.optim has it

FLAGS = ("maximize", "anchored", "stochastic_rounding", "master_weights")
_STATE_DTYPES_TOLD = f"torch.float32, torch.bfloat16 or {EIGHT_BIT!r}"
STATE_DTYPES = (torch.float32, torch.bfloat16, EIGHT_BIT)  # of the moments, if the arithmetic is float32


@dataclass(frozen=True)
class GroupSpec:
    """What a group asks for, without the numbers that a schedule may change. A plan is made for it.

    anchored: whether its parameters have an anchor other than zero.
    amsgrad, momentum: whether the base keeps that state.
    """

    rule: Rule
    anchored: bool = False
    amsgrad: bool = False
    momentum: bool = False
    stochastic_rounding: bool = False
    master_weights: bool = False
    state_dtype: torch.dtype | str = torch.float32
    anchor_device: str | None = None
    seed: int = 0
    capturable: bool = False

    def under(self, rule: Rule) -> "GroupSpec":
        """The same under another rule."""
        return self if rule is self.rule else replace(self, rule=rule)


def spec_of(group: Mapping[str, Any]) -> GroupSpec:
    """The spec of a group. Raises ValueError for an unknown method, or a norm that its method does not have."""
    return GroupSpec(
        rule_of_group(group),
        is_anchored(group),
        amsgrad=bool(group.get("amsgrad", False)),
        momentum=bool(group.get("momentum", 0) != 0),
        stochastic_rounding=bool(group.get("stochastic_rounding", False)),
        master_weights=bool(group.get("master_weights", False)),
        state_dtype=as_dtype("state_dtype", group.get("state_dtype", torch.float32)),
        anchor_device=group.get("anchor_device"),
        seed=group.get("seed", 0),
        capturable=bool(group.get("capturable", False)),
    )


def is_anchored(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of a group have anchors other than zero."""
    return method_of(group["method"]).anchored and group["anchor"] != "zero"


Needed = Callable[[GroupSpec, Tensor], bool]  # whether this parameter, in such a group, keeps something


def _has_master(spec: GroupSpec, param: Tensor) -> bool:
    return spec.master_weights and param.dtype.itemsize == 2


def _has_scales(spec: GroupSpec, param: Tensor) -> bool:
    return spec.state_dtype == EIGHT_BIT and in_blocks(param)


@dataclass(frozen=True, eq=False)
class Base:
    """A base optimizer, as the backends see it.

    own: its own hyper-parameters.
    moments: the moments that it keeps for a parameter, and when each is needed.
    counted: which parameters keep a step count.
    moves: whether it makes a step at all.
    """

    name: str
    own: tuple[str, ...]
    moments: Mapping[str, Needed]
    counted: Needed
    moves: bool = True

    @property
    def hyper(self) -> tuple[str, ...]:
        """The columns of a group's row of hyper-parameters."""
        return (*self.own, *METHOD_HYPER, *FLAGS)

    @property
    def state(self) -> dict[str, Needed]:
        """The tensors that it and the methods keep for a parameter, and when each is needed."""
        scales = {
            key + SCALE: lambda spec, param, needed=needed: needed(spec, param) and _has_scales(spec, param)
            for key, needed in self.moments.items()
        }
        return {**self.moments, **scales, **(_KEPT if self.moves else {"master": _has_master})}


_KEPT: dict[str, Needed] = {
    "delta": lambda spec, _: spec.rule.tracks,
    **{key: lambda spec, _, key=key: spec.rule.learns == key for key in LEARNED},  # type: ignore[misc]
    "master": _has_master,
}
ADAMW = Base(
    "adamw",
    own=("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad"),
    moments={
        "exp_avg": lambda *_: True,
        "exp_avg_sq": lambda *_: True,
        "max_exp_avg_sq": lambda spec, _: spec.amsgrad,
    },
    counted=lambda *_: True,
)
SGD = Base(
    "sgd",
    own=("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    moments={"momentum_buffer": lambda spec, _: spec.momentum},
    counted=lambda spec, _: spec.momentum or spec.rule.tracks or spec.stochastic_rounding,
)
# θ̃ = θ: it only measures or pulls. Gradients may be left out, and ⟨g,d⟩ is then nan. It counts no steps. Its random
# bits are those of the step before it.
NO_STEP = Base("no_step", own=("lr",), moments={}, counted=lambda spec, _: spec.stochastic_rounding, moves=False)
BASES = (ADAMW, SGD, NO_STEP)
KEPT = {key for base in BASES for key in base.state} | {"step", "anchor"}  # a user may keep more of a parameter


def hyper_of(group: Mapping[str, Any], base: Base, spec: GroupSpec) -> dict[str, Any]:
    """The hyper-parameters of a group by their columns, as numbers, flags or tensors. All of them reach the backends
    this way.

    What neither the base nor the rule reads is 0. Raises ValueError when the rule reads a radius that is not above 0.
    """
    read = {*FLAGS, *spec.rule.reads, *(base.own if base.moves else ())}
    values = {**group, **{flag: getattr(spec, flag) for flag in FLAGS if flag != "maximize"}}
    values["maximize"] = group.get("maximize", False)
    for key, pair in (("betas", ("beta1", "beta2")), ("radius_betas", ("radius_beta1", "radius_beta2"))):
        if read.intersection(pair):
            values.update(zip(pair, group[key], strict=True))
    if "radius" in read:
        check_number("radius", values["radius"], POSITIVE, f"method {group['method']!r}", read=False)
    return {column: values[column] if column in read else 0.0 for column in base.hyper}


RANGES = {
    "lr": NOT_NEGATIVE, "eps": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "momentum": NOT_NEGATIVE,
    "dampening": FINITE, "strength": NOT_NEGATIVE, "radius": POSITIVE, "k": FROM_0_TO_1, "radius_lr": NOT_NEGATIVE,
}  # fmt: skip


def check_hyper(group: Group) -> None:
    """Raises ValueError naming the first hyper-parameter of a group that is out of its range."""
    reads = rule_of_group(group).reads
    for key, within in RANGES.items():
        needed_by = f"method {group['method']!r}" if key in reads else ""
        if needed_by or (key in group and not (key == "radius" and group[key] is None)):
            check_number(key, group.get(key), within, needed_by)
    if group["state_dtype"] not in STATE_DTYPES:
        raise ValueError(f"state_dtype must be {_STATE_DTYPES_TOLD}, got {group['state_dtype']!r}")
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], int) or not 0 <= group["seed"] < 2**31:
        raise ValueError(f"seed must be an integer of at least 0 and below 2**31, got {group['seed']!r}")
    for key in ("betas", "radius_betas"):
        pair = group.get(key, (0, 0))
        if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
            raise ValueError(f"{key} must be two numbers, such as (0.9, 0.999), got {pair!r}")
        for i, beta in enumerate(group.get(key, ())):
            check_number(f"{key}[{i}]", beta, BELOW_1)
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs a momentum above 0 and dampening=0")


def spec_of_hyper(base: Base, values: Mapping[str, float], rule: str) -> GroupSpec:
    """The spec that a row of hyper-parameters and the name of a rule stand for. Raises ValueError for an unknown
    rule."""
    if rule not in RULES:
        raise ValueError(f"robustft: there is no rule {rule!r}; the rules are {', '.join(RULES)}")
    anchored, amsgrad, momentum, stochastic_rounding, master_weights = (
        bool(values.get(flag, 0))
        for flag in ("anchored", "amsgrad", "momentum", "stochastic_rounding", "master_weights")
    )
    return GroupSpec(RULES[rule], anchored, amsgrad, momentum, stochastic_rounding, master_weights)


DTYPE_OPTIONS = ("state_dtype", "anchor_dtype")  # of a group


def as_dtype(key: str, value: Any) -> Any:
    """The dtype of an option that may be given by name, such as "bfloat16". Leaves "exact", "8bit", None and dtypes as
    they are.

    Raises ValueError for a text that names no dtype.
    """
    if not isinstance(value, str) or (key, value) in (("anchor_dtype", "exact"), ("state_dtype", EIGHT_BIT)):
        return value
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        allowed = _STATE_DTYPES_TOLD if key == "state_dtype" else "'exact', None or a floating-point torch.dtype"
        raise ValueError(f"{key} must be {allowed}, or its name, got {value!r}")
    return dtype


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter of `dtype` is computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def delta_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of FTP's c. It serves as a direction, and bfloat16 is enough for that. It has the range of float32."""
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


def state_dtype_of(key: str, param: Tensor, state_dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of the state `key` of a parameter.

    Learned numbers are in float64, master weights in float32, the delta in bfloat16, moments in `state_dtype`. For
    float64 parameters, delta and moments are in float64. Moments that cannot be in 8 bits are in float32.
    """
    dtype = param.dtype
    if key in LEARNED:
        return torch.float64
    if key == "delta":
        return delta_dtype_of(dtype)
    if key == "master":
        return torch.float32
    if is_scale(key):
        return torch.uint8
    if dtype == torch.float64:
        return torch.float64
    if isinstance(state_dtype, torch.dtype):
        return state_dtype
    return dtype_of_codes(key) if in_blocks(param) else torch.float32


def state_shape_of(key: str, param: Tensor) -> tuple[int, ...]:
    """The shape of the state `key` of a parameter."""
    if is_scale(key):
        return shape_of_scales(param)
    return (len(LEARNED[key]),) if key in LEARNED else tuple(param.shape)
