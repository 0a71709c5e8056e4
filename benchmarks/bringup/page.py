"""The page of a bring-up, from its record. It also has what was predicted before any GPU had run the kernels."""

from dataclasses import dataclass
from typing import Any

from benchmarks.contenders import BASELINE
from benchmarks.contest import COPY
from benchmarks.markdown import number, table, told

OURS = "AdamSPD"
SWEEPS = """Launches of the Triton backend are timed one by one. Of the CUDA backend there are whole steps, alone on the
device: those in which nothing fires, and those of the table above. What the latter take longer is what firing costs."""
VIT_L, LORA, SMALL = "ViT-L/16, float32", "LoRA, 256 × 32,768", "2,000 × 256"


@dataclass(frozen=True)
class Prediction:
    """on: a list of tensors. what: words for it. path: where the measured number is. scale: of that number."""

    on: str
    what: str
    low: float
    high: float
    path: tuple[str | int, ...]
    scale: float = 1.0

    def measured(self, timings: dict[str, Any]) -> float | None:
        found: Any = timings.get(self.on, {})
        for key in self.path:
            if isinstance(found, dict) and key not in found:
                return None
            found = found[key]
        return float(found) * self.scale

    def row(self, timings: dict[str, Any]) -> list[str]:
        value = self.measured(timings)
        verdict = "not measured"
        if value is not None:
            verdict = "below" if value < self.low else "above" if value > self.high else "as predicted"
        return [self.on, self.what, f"{self.low:g} to {self.high:g}", "–" if value is None else f"{value:.3g}", verdict]


# Of an H100 with 3.35 TB/s, half of the elements in tensors that fire. They are held to what is measured, not kept.
ON_DEVICE = ("contenders", OURS, "device_ratio", 1)
IN_WALL_TIME = ("contenders", OURS, "ratio", 1)
PREDICTIONS = (
    Prediction(VIT_L, "sweep 1, ms", 3.3, 3.55, ("sweeps", "step_sweep", "seconds", 1), 1e3),
    Prediction(VIT_L, "sweep 1, % of the peak bandwidth", 81, 88, ("sweeps", "step_sweep", "of peak"), 100),
    Prediction(VIT_L, "sweep 2, ms", 0.62, 0.70, ("sweeps", "pull_sweep", "seconds", 1), 1e3),
    Prediction(VIT_L, "over fused AdamW, on the device", 1.20, 1.38, ON_DEVICE),
    Prediction(LORA, "over fused AdamW, on the device", 0.65, 0.85, ON_DEVICE),
    Prediction(LORA, "over fused AdamW, in wall time", 0.3, 0.5, IN_WALL_TIME),
    Prediction(SMALL, "over fused AdamW, in wall time", 0.3, 0.45, IN_WALL_TIME),
)


def page_of(record: dict[str, Any]) -> str:
    stages = record["stages"]
    gpu = record["device"] == "cuda"
    timings = {name: of for name, of in stages.get("timings", {}).get("items", {}).items() if "contenders" in of}
    parts = [
        f"# Bring-up on {'a GPU' if gpu else 'the CPU'}",
        f"Began {record['began']}, for {record['minutes']:g} minutes at most.",
    ]
    if not gpu:
        parts.append("**No GPU was at work.** Triton's interpreter ran the kernels, on small tensors. The numbers show")
        parts[-1] += " that the program runs, and nothing about speed."
    parts += ["## Machine", _facts(stages), "## Stages", _stages(stages)]
    if problems := _problems(stages):
        parts += ["## What failed or was left out", problems]
    if timings:
        parts += [
            "## Time of a step",
            _ratios(timings, "ratio", "wall time"),
            _ratios(timings, "device_ratio", "device time"),
        ]
        parts += [_host(timings), _absent(timings), "## Sweeps", SWEEPS, _sweeps(timings)]
    if gpu:
        parts += ["## Predictions", "They were made without a GPU, for an H100.", _predictions(timings)]
    parts += ["## Last lines", *(f"{name}:\n\n```\n{of['tail']}\n```" for name, of in stages.items() if of["tail"])]
    return "\n\n".join(filter(None, parts)) + "\n"


def _facts(stages: dict[str, Any]) -> str:
    items = {
        name: of
        for stage in ("facts", "build")
        for name, of in stages.get(stage, {}).get("items", {}).items()
        if stage == "facts" or "facts" in of
    }
    lines = []
    for name, of in items.items():
        facts = ", ".join(f"{key} {value}" for key, value in of.get("facts", {}).items() if value not in ("", False))
        lacks = [key for key, value in of.get("facts", {}).items() if value in ("", False)]
        lines.append(f"- {name}: {facts}" + (f" (absent: {', '.join(lacks)})" if lacks else ""))
    return "\n".join(lines) or "Not known."


def _stages(stages: dict[str, Any]) -> str:
    rows = [
        [name, of["outcome"], f"{of['seconds']:.0f}", ", ".join(f"{n} {what}" for what, n in of["counts"].items())]
        for name, of in stages.items()
    ]
    return table(["stage", "outcome", "s", "items"], rows)


def _problems(stages: dict[str, Any]) -> str:
    found = [(name, *of) for name, stage in stages.items() for of in stage["problems"].items()]
    for name, stage in stages.items():
        found += [
            (name, item, f"skipped: {of['why']}") for item, of in stage["items"].items() if of["outcome"] == "skipped"
        ]
    return "\n".join(f"- {stage}, {item}: {' '.join(why.split())}" for stage, item, why in found)


def _names(timings: dict[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys(n for of in timings.values() for n in of["contenders"]) if name != COPY]


def _ratios(timings: dict[str, Any], key: str, what: str) -> str:
    seconds = "seconds" if key == "ratio" else "device"
    names = [name for name in _names(timings) if name != BASELINE]
    rows = []
    for on, of in timings.items():
        base = of["contenders"][BASELINE]
        cells = [of["contenders"].get(name, {}).get(key) for name in names]
        rows.append(
            [on, f"{of['parameters']:,}", f"{1e3 * base[seconds]:.3g}", *("–" if q is None else told(q) for q in cells)]
        )
    over = [f"{name} over it" for name in names]
    return table([f"{what}: median (quartiles)", "parameters", f"{BASELINE}, ms", *over], rows)


def _host(timings: dict[str, Any]) -> str:
    names = _names(timings)
    rows = [
        [on, *(f"{1e6 * of['contenders'][name]['host']:.0f}" if name in of["contenders"] else "–" for name in names)]
        for on, of in timings.items()
    ]
    return table(["host time: µs until the call returns", *names], rows)


def _absent(timings: dict[str, Any]) -> str:
    return "\n".join(f"- {on}, {name}: {why}" for on, of in timings.items() for name, why in of["absent"].items())


def _sweeps(timings: dict[str, Any]) -> str:
    rows = []
    for on, of in timings.items():
        copied = of["contenders"][COPY]
        copy = copied["bytes"] / copied["device"] / 1e9
        for kernel, sweep in of["sweeps"].items():
            speed = sweep["bytes"] / sweep["seconds"][1] / 1e9
            peak = number(sweep.get("of peak", float("nan")), "{:.0%}")
            fired = number(sweep.get("fired", float("nan")), "{:.0%}")
            rows.append(
                [
                    on,
                    kernel,
                    fired,
                    told([1e3 * q for q in sweep["seconds"]]),
                    f"{speed:.0f}",
                    peak,
                    f"{speed / copy:.0%}",
                ]
            )
    return table(["", "kernel", "fired", "ms", "GB/s", "of the peak", "of a copy"], rows)


def _predictions(timings: dict[str, Any]) -> str:
    return table(["", "", "predicted", "measured", ""], [of.row(timings) for of in PREDICTIONS])
