"""Sweeps without a step over tensors that come again, as those of projections do. Each is prepared once."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends import registry
from ..core.bases import NO_STEP, GroupSpec
from ..core.contract import StepTensors, empty_results
from ..core.exchange import Segments
from ..core.memory import is_lazily_read, unowned, without_memory
from ..core.methods import MEASURES, Rule
from ..core.sharding import is_dtensor, local, placed_as, spec_of_shards
from ..core.staging import capturing, staged
from ..core.state import beside, same_layout
from .fingerprint import forms
from .no_step import NoStep
from .plans import ROOM, Plans

RADIUS = NO_STEP.hyper.index("radius")
T = TypeVar("T")
Tensors = Sequence[Tensor]


class SweepCache:
    """Sweeps by the fastest backend. Those that were used last are kept, by where their tensors are and in which form.

    The tensors are not kept alive. Others in the same memory and form may take their place. A sweep that is kept sends
    nothing to the device but the addresses of gradients. It has scratch memory and results of its own. So there is one
    for each CUDA stream.

    A CUDA graph can capture a sweep that is kept, of any stream. Its memory is then kept for good.

    room: how many are kept.
    """

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._made: Plans[_Made] = Plans(room)
        self._captured: list[_Made] = []
        self._streams: dict[int, None] = {}
        self._lock = RLock()  # a backward pass has threads of its own

    def __reduce__(self) -> tuple[Any, ...]:
        return SweepCache, (self._room,)  # a copy begins empty

    def measure(self, rule: Rule, params: Tensors, anchors: Tensors | None, grads: Tensors = ()) -> dict[str, Tensor]:
        """What a rule measures, by name, with one float64 for each segment. If shards of the tensors are in other
        processes, one all-reduce sums over them."""
        if not any(map(is_dtensor, params)):
            return dict(zip(MEASURES, self._run(rule, params, anchors, grads), strict=True))
        here = [local(placed_as(grad, param)) for grad, param in zip(grads, params, strict=False)]
        found = self._run(rule, *_shards(params, anchors), here)
        return dict(zip(MEASURES, self._segments(rule, params).whole(found.T).T, strict=True))

    def pull(
        self,
        rule: Rule,
        params: Tensors,
        anchors: Tensors | None,
        *,
        alphas: Tensor | None = None,
        radii: Tensor | None = None,
    ) -> None:
        """θ ← θ₀ + α·c.

        alphas: one a segment, for a rule that is given them.
        radii: one a tensor, for a rule that reads them. On a GPU they stay on the device. Not for shards.
        """
        if any(map(is_dtensor, params)):
            assert alphas is not None
            alphas = self._segments(rule, params).parts(alphas)
            params, anchors = _shards(params, anchors)
        self._run(rule, params, anchors, alphas=alphas, radii=radii)

    def lengths(self, counts: Sequence[int], device: torch.device) -> Tensor:
        """Counts of segments as int64 on a device. Not to be written."""
        key = "lengths", tuple(counts)
        return self._kept(key, device, lambda: staged(torch.tensor(counts, dtype=torch.int64, device="cpu"), device))

    def _segments(self, rule: Rule, params: Tensors) -> Segments:
        specs = [spec_of_shards(param) for param in params]
        key = "segments", rule, tuple((id(spec), param.shape) for spec, param in zip(specs, params, strict=True))
        # The specs are kept alive, as their ids could be used again.
        made = self._kept(key, local(params[0]).device, lambda: (Segments(params, [rule] * len(params)), specs))
        return made[0]

    def _run(
        self,
        rule: Rule,
        params: Tensors,
        anchors: Tensors | None,
        grads: Tensors = (),
        alphas: Tensor | None = None,
        radii: Tensor | None = None,
    ) -> Tensor:
        """One sweep. Returns what was measured, [measures, segments]."""
        if not params:
            return empty_results(0, torch.device("cpu"))[0].T[: len(MEASURES)]
        device, memory, of_grads = params[0].device, forms([*params, *(anchors or ())]), forms(grads, addresses=False)
        key = "sweep", rule, len(params), anchors is None, memory, of_grads
        with self._lock, torch.no_grad(), torch.inference_mode(False):
            sweep = self._find(key, device) if memory is not None and of_grads is not None else None
            aside = sweep is not None
            if sweep is None:
                _refuse_capture(device)
                lying = None if anchors is None else [beside(p, a) for p, a in zip(params, anchors, strict=True)]
                aside = memory is not None and of_grads is not None and _is_keepable(params, anchors, lying, grads)
                if aside:
                    sweep = _Sweep(rule, _unowned(params), None if lying is None else _unowned(lying), grads)
                    self._add(key, device, sweep)
                else:
                    sweep = _Sweep(rule, params, lying, grads)
            sweep(grads, alphas, radii)
            if aside and rule.pulls:
                torch.autograd.graph.increment_version([param for param in params if not param.is_inference()])
            return sweep.measures.clone()

    def _kept(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        with self._lock, torch.inference_mode(False):
            found: T | None = self._find(key, device)
            if found is None:
                _refuse_capture(device)
                found = self._add(key, device, make())
            return found

    def _find(self, key: Hashable, device: torch.device) -> Any:
        """What is kept by this key for the current stream, or None. Under capture that of any stream will do, since all
        streams are idle when a capture begins."""
        if not _in_capture(device):
            made = self._made.find((key, _stream_on(device)))
            return None if made is None else made.value
        for stream in self._streams:
            if (made := self._made.find((key, stream))) is not None:
                if made not in self._captured:
                    self._captured.append(made)
                return made.value
        return None

    def _add(self, key: Hashable, device: torch.device, value: T) -> T:
        stream = _stream_on(device)
        self._streams[stream] = None
        self._made.add(_Made((key, stream), value))
        return value


@dataclass(eq=False)
class _Made:
    key: Hashable
    value: Any


class _Sweep:
    """One sweep, prepared. If its rule reads a radius, each tensor is a group of its own."""

    def __init__(self, rule: Rule, params: Tensors, anchors: Tensors | None, grads: Tensors) -> None:
        device, alone = params[0].device, "radius" in rule.reads
        backend = registry.choose_backend("auto", device, {of.dtype for of in (*params, *(anchors or ()), *grads)})
        spec = GroupSpec(rule, anchored=anchors is not None)
        tensors = [
            StepTensors(spec, k if alone else 0, param, None if anchors is None else anchors[k])
            for k, param in enumerate(params)
        ]
        width = len(NO_STEP.hyper)
        self._hyper = torch.zeros(len(params) if alone else 1, width, dtype=torch.float64, device="cpu")
        self._radii: Tensor | None = None
        live = {}
        if alone and backend.keeps_addresses:
            self._radii = torch.empty(len(params), dtype=torch.float64, device=device)
            live = {k * width + RADIUS: radius for k, radius in enumerate(self._radii.unbind())}
        self._sweep = NoStep(backend, tensors, self._hyper, live)
        self.measures = self._sweep.results.T[: len(MEASURES)]

    def __call__(self, grads: Tensors, alphas: Tensor | None, radii: Tensor | None) -> None:
        if alphas is not None:
            self._sweep.alphas.copy_(alphas)
        if radii is not None:
            (self._hyper[:, RADIUS] if self._radii is None else self._radii).copy_(radii.clamp(min=0))
        self._sweep(grads)


def _is_keepable(params: Tensors, anchors: Tensors | None, lying: Tensors | None, grads: Tensors) -> bool:
    """Whether a sweep needs no copies of these tensors, and all their numbers are in their memory."""
    if anchors is not None and lying is not None and any(a is not b for a, b in zip(anchors, lying, strict=True)):
        return False
    if any(without_memory(of) or is_lazily_read(of) for of in (*params, *(anchors or ()), *grads)):
        return False
    return all(same_layout(grad, param) for grad, param in zip(grads, params, strict=False))


def _unowned(tensors: Tensors) -> list[Tensor]:
    return list(map(unowned, tensors))


def _shards(params: Tensors, anchors: Tensors | None) -> tuple[list[Tensor], list[Tensor] | None]:
    """What is here of the params, and of anchors spread as they are."""
    if anchors is None:
        return list(map(local, params)), None
    placed = [local(beside(p, placed_as(a, p))) for p, a in zip(params, anchors, strict=True)]
    return list(map(local, params)), placed


def _stream_on(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _in_capture(device: torch.device) -> bool:
    return device.type == "cuda" and capturing()


def _refuse_capture(device: torch.device) -> None:
    if _in_capture(device):
        raise RuntimeError(
            "robustft: a CUDA graph is being captured, and this sweep is not prepared; make the same call once before "
            "the capture, with the same tensors, each anchor in the memory layout of its param"
        )
