"""What the last step did to each parameter, in numbers. They are read from the device only when asked for, and can be
logged and drawn."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isnan, nan
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .core.bases import Group
from .core.exchange import Reach, reach_of
from .core.methods import METHODS, RESULTS, rule_of_group
from .core.sharding import is_spread, local
from .finetune.projection import deviation
from .step import anchor_sizes
from .step.results import Found

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[Tensor, Found]
_MOST_NAMES = 60  # that stand side by side in the widest picture


class Telemetry(NamedTuple):
    """One parameter as its last step left it.

    deviation: n = ‖θ − θ₀‖ in the norm of its method. That is Frobenius for "l2", and the largest row sum maxᵢ Σ|cᵢ|
        for "mars" and "mars_rows" ("ftp" and "mars_sp" included). It comes from the sums of the step: α·n before the
        pull, to the rounding of the parameter's dtype. Methods that need no sums ("none", "mars_sp", "digrap",
        and those of L2-SP) are measured when asked, but not over processes: it is nan then. nan without an anchor.
    relative_deviation: deviation / ‖θ₀‖ in the same norm. nan if θ₀ is zero.
    alpha: α of the last step. If each row has its own α, their mean.
    selected: the share of segments (1, or the rows) with α ≠ 1 in the last step.
    selections: in how many steps so far α was not 1, as the mean over the segments.
    radius: the radius of "project", or γ as learned by "ftp". nan for the other methods.
    inconsistencies: of "spd", in how many steps so far ⟨g,d⟩ was above 0, as the mean over the segments. The gate was
        open then, unless it is "away", and α was below 1 only if the step led away too. nan for the other methods.
    """

    deviation: float
    relative_deviation: float
    alpha: float
    selected: float
    selections: float
    radius: float
    inconsistencies: float = nan

    def __repr__(self) -> str:
        """Four digits of each number. All digits are in the numbers themselves."""
        return f"Telemetry({', '.join(f'{key}={value:.4g}' for key, value in self._asdict().items())})"


class Writer(Protocol):
    """What torch.utils.tensorboard.SummaryWriter offers."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


@torch.no_grad()
def collect(groups: list[Group], kept: Mapping[Tensor, Mapping[str, Any]], results: Results) -> dict[str, Telemetry]:
    """`Telemetry` of every parameter of `groups`, by name. Without names, by place over all groups: "0", "1", ...

    kept: what is kept for each parameter: its "anchor", its "radius_state".
    results: as plan.Plan has them. A parameter that has made no step has α = 1, no selections, and the deviation that
        it has now.

    There is one transfer from each device, with the sums of all segments. ‖θ₀‖ is measured at the first call and then
    kept. Over processes the first step has measured it. Nothing is exchanged here.
    """
    subjects = list(_subjects(groups, kept, results))
    told: dict[str, Telemetry] = {}
    for device in {subject.param.device for subject in subjects}:
        there = [subject for subject in subjects if subject.param.device == device]
        _measure(there)
        told.update((s.name, s.told(numbers)) for s, numbers in zip(there, _read(there), strict=True))
    return {subject.name: told[subject.name] for subject in subjects}


def log(telemetry: Mapping[str, Telemetry], writer: Writer, step: int, prefix: str = "") -> None:
    """Writes each number that is not nan as the scalar "{prefix}{number}/{parameter}". So TensorBoard shows one number
    of all parameters together.

    writer: a SummaryWriter, or anything with its `add_scalar`.
    """
    for name, of in telemetry.items():
        for key, value in of._asdict().items():
            if not isnan(value):
                writer.add_scalar(f"{prefix}{key}/{name}", value, step)


def draw(
    telemetry: Mapping[str, Telemetry] | Mapping[int, Mapping[str, Telemetry]], path: str | PathLike[str] | None = None
) -> "Figure":
    """Draws the parameters by depth, in the order given.

    Above are the deviation and the radius (dashed) of each, with one line for each kind (the last part of the name).
    Below is how often each was selected. Of more than 60 parameters, only every second, third, ... is named.

    Args:
        telemetry: of one step, or a history {step: telemetry} of the same parameters. A history is drawn from light to
            dark. The lower part then shows the share of steps with a selection, from one record to the next.
        path: where to save it, in the format of its suffix.

    Returns:
        The matplotlib Figure. pyplot is not involved.

    Raises ImportError without matplotlib, and ValueError if there is nothing to draw.
    Source: the kind of TPGM (Tian et al., CVPR 2023), Figures 2 and 4.
    """
    try:
        import numpy as np
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("telemetry.draw needs matplotlib: pip install matplotlib") from error
    if not telemetry:
        raise ValueError("there is no telemetry to draw")
    single = isinstance(next(iter(telemetry.values())), Telemetry)
    history = cast(Mapping[int, Mapping[str, Telemetry]], {0: telemetry} if single else telemetry)
    steps = sorted(history)
    names = list(history[steps[-1]])
    if not names or any(list(history[step]) != names for step in steps):
        raise ValueError("the telemetries of a history must be of the same parameters, and of at least one")

    kinds: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        kinds.setdefault(name.rpartition(".")[2] if "." in name else "", []).append(place)

    figure = Figure(figsize=(max(6.0, min(16.0, 3 + 0.2 * len(names))), 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    colours = dict(zip(steps, colormaps["viridis"](np.linspace(0.1, 0.85, len(steps))[::-1]), strict=True))
    in_legend = {steps[round(k * (len(steps) - 1) / 5)] for k in range(6)}
    for step in steps:
        labels = {"deviation": "deviation", "radius": "radius"} if single else {"deviation": f"step {step}"}
        for key, style in (("deviation", ".-"), ("radius", "x--")):
            label = labels.get(key) if step in in_legend else None
            values = [getattr(of, key) for of in history[step].values()]
            for places in kinds.values():
                line = [values[place] for place in places]
                if not all(map(isnan, line)):
                    above.plot(places, line, style, color=colours[step], label=label)
                    label = None
    above.set_ylabel("deviation, radius")
    above.grid(alpha=0.3)
    if above.lines:
        above.legend()
    if single:
        below.bar(range(len(names)), [of.selections for of in history[0].values()], color=colours[0])
    elif len(steps) > 1:
        counts = np.array([[of.selections for of in history[step].values()] for step in steps])
        edges = np.arange(len(names) + 1) - 0.5
        shares = np.diff(counts, axis=0) / np.diff(steps)[:, None]
        mesh = below.pcolormesh(edges, steps, shares, vmin=0, vmax=1, cmap="Greys")
        figure.colorbar(mesh, ax=(above, below), label="share of steps selected")
    below.set_ylabel("steps selected" if single else "step")
    shown = range(0, len(names), -(-len(names) // _MOST_NAMES))
    below.set_xticks(shown, [names[place] for place in shown], rotation=90, fontsize=8)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


@dataclass
class _Subject:
    """A parameter, and what is to be told of it. numbers: float64, flat, on its device."""

    name: str
    param: Tensor
    anchor: Tensor | None
    zero: bool  # its anchor is zero
    norm: str  # "l2" or "mars"
    measured: bool
    gated: bool  # its method has a gate
    radius: float = nan  # if the host knows it
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def told(self, numbers: dict[str, Any]) -> Telemetry:
        """Its telemetry, from the same numbers on the host."""
        first = {key: values[0].tolist() if len(values) else nan for key, values in numbers.items()}
        deviation, radius = first.get("deviation", nan), first.get("radius", self.radius)
        alpha, selected, selections, inconsistencies = 1.0, 0.0, 0.0, 0.0
        if len(told := numbers.get("told", ())):
            deviation, alpha, selected, selections, inconsistencies = told.tolist()
        elif len(alphas := numbers.get("alphas", ())):
            found = dict(zip(RESULTS, numbers["results"].reshape(-1, len(RESULTS)).T, strict=True))
            alpha, selected = alphas.mean().tolist(), (alphas != 1).double().mean().tolist()
            selections, inconsistencies = (found[key].mean().tolist() for key in ("selected", "inconsistent"))
            if self.measured:
                sizes = (found["before"] + found["gain"]).clamp(min=0)
                deviation = ((sizes.sqrt() if self.norm == "l2" else sizes) * alphas).max().tolist()
        elif self.measured:
            deviation = 0.0  # it has no rows
        whole = first.get("anchor", 0.0)
        relative, inconsistencies = deviation / whole if whole else nan, inconsistencies if self.gated else nan
        return Telemetry(deviation, relative, alpha, selected, selections, radius, inconsistencies)


def _subjects(groups: list[Group], kept: Mapping[Tensor, Mapping[str, Any]], results: Results) -> Iterable[_Subject]:
    place = 0
    for group in groups:
        method, names = group["method"], group.get("param_names")
        rule = rule_of_group(group)
        norm = group["norm"] or next(iter(METHODS[method].rules))
        for k, param in enumerate(group["params"]):
            of_param = kept.get(param, {})
            found = results.get(param, Found(torch.empty(0), torch.empty(0)))
            rows = reach_of(param, rule) is Reach.ROWS
            segments = rule.segments_of((local(param) if rows else param).shape)
            known = param in results and len(found.alphas) == segments and rows == (found.told is not None)
            subject = _Subject(
                names[k] if names else str(place),
                param,
                None if group["anchor"] == "zero" else of_param.get("anchor"),
                group["anchor"] == "zero",
                "l2" if norm == "l2" else "mars",
                known and bool(rule.measures),
                bool(METHODS[method].gated),
            )
            if known and found.told is not None:
                subject.numbers["told"] = found.told
            elif known:
                subject.numbers.update(results=found.results.flatten(), alphas=found.alphas)
            if rule.learns and rule.learns in of_param:
                subject.numbers["radius"] = of_param[rule.learns][:1]
            elif "radius" in rule.reads and _lies_on(param.device, group["radius"]):
                subject.numbers["radius"] = group["radius"].detach().double().reshape(1)
            elif "radius" in rule.reads:
                subject.radius = float(group["radius"])
            yield subject
            place += 1


def _lies_on(device: torch.device, value: object) -> bool:
    return isinstance(value, Tensor) and value.device == device


def _measure(subjects: list[_Subject]) -> None:
    """Measures the deviations that no step found, and ‖θ₀‖, where no other process is needed for that. All subjects are
    on one device."""
    for norm in ("l2", "mars"):
        of_norm = [subject for subject in subjects if subject.norm == norm]
        for zero in (False, True):
            todo = [s for s in of_norm if not s.measured and (s.zero if zero else s.anchor is not None)]
            todo = [s for s in todo if not is_spread(s.param)]
            if not todo:
                continue
            anchors = None if zero else [cast(Tensor, s.anchor) for s in todo]
            norms = cast(Tensor, deviation([s.param for s in todo], anchors, norm))
            for subject, size in zip(todo, norms.split(1), strict=True):
                subject.numbers["deviation"] = size
        anchored = [s.anchor for s in of_norm if s.anchor is not None]
        new = [of for of in anchored if not is_spread(of) and anchor_sizes.known_size(of, norm) is None]
        anchor_sizes.measure(new, norm)
        for subject in of_norm:
            if subject.anchor is not None and (size := anchor_sizes.known_size(subject.anchor, norm)) is not None:
                subject.numbers["anchor"] = size


def _read(subjects: list[_Subject]) -> Iterator[dict[str, Any]]:
    """The numbers of one device, brought to the host in one transfer."""
    on_device = [number for subject in subjects for number in subject.numbers.values()]
    on_host = torch.cat(on_device).cpu() if on_device else None
    end = 0
    for subject in subjects:
        numbers = {}
        for key, number in subject.numbers.items():
            assert on_host is not None
            numbers[key] = on_host[end : end + number.numel()]
            end += number.numel()
        yield numbers
