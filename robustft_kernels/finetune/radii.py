"""The radii of TPGM: how they are learned, used, saved and loaded."""

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import digests
from ..core.checkpoint import check_names
from ..core.ranges import Range, check_number
from ..core.state import check_loadable, copy_beside
from .evaluation import Feed, as_found, evaluation_mode, put
from .prefixes import matching
from .projection import Ball, as_lists
from .slopes import dots_of

COUNT = Range(1, finite=False)
Loss = Callable[[Any], Tensor]
FLOOR = 1e-8  # no radius is smaller
LONG = 20  # steps: from so many on, a terminal gets a progress bar


class LearnedRadii:
    """What `TPGM` learns; not to be constructed itself."""

    norm: str
    names: list[str]
    radius_penalty: float
    tv: float
    clamp: bool
    calls: int
    save_anchors: bool
    _model: nn.Module | None
    _replicas: Any  # a process group, or None
    _params: list[Tensor]
    _ball: Ball
    _neighbour_pairs: Tensor
    _anchor: str
    _anchors: list[Tensor] | None
    _adam: torch.optim.Adam
    _started: bool  # if not, the radii wait for the first norms
    _alphas: Tensor | None
    _feed: Feed

    def __repr__(self) -> str:
        lr = self._adam.param_groups[0]["lr"]
        return (
            f"{type(self).__name__}({len(self.names)} parameters, norm={self.norm!r}, anchor={self._anchor!r}, "
            f"lr={lr}, radius_penalty={self.radius_penalty}, tv={self.tv}, calls={self.calls})"
        )

    @property
    def radii(self) -> dict[str, Tensor]:
        """γ by parameter name: 0-d, float64, copies. NaN as long as init="half_min" has seen no norms."""
        return dict(zip(self.names, _radii_of(self._adam).clone().unbind(), strict=True))

    @property
    def alphas(self) -> dict[str, Tensor]:
        """α of the last update or projection by parameter name: 0-d, or [rows] for "mars_rows". Empty before it."""
        if self._alphas is None:
            return {}
        each = self._alphas.split(self._ball.counts) if self._ball.alpha_by_row else self._alphas.unbind()
        return dict(zip(self.names, each, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Radii, Adam's state, counts, and unless `save_anchors=False` the anchors with their digests. For torch.save,
        and torch.load(weights_only=True). The place within `batches` is kept only for a list or tuple."""
        anchors = self._anchors if self.save_anchors and self._anchors else []
        return {
            "norm": self.norm,
            "names": list(self.names),
            "radii": _radii_of(self._adam).clone(),
            "started": self._started,
            "adam": copy.deepcopy(self._adam.state_dict()),
            "calls": self.calls,
            "taken": self._feed.taken,
            "anchor": self._anchor,
            "anchors": dict(zip(self.names, anchors, strict=False)),
            "anchor_digests": {n: of.clone() for n, of in zip(self.names, digests.digests(anchors), strict=False)},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a copy of what `state_dict` returned. Training then continues as it would have there.

        Adam's lr comes from the checkpoint, and so do the anchors if it has them. Raises ValueError, before anything is
        changed, if names, norm or shapes differ, or an anchor does not fit its digest.
        """
        if state_dict["norm"] != self.norm:
            raise ValueError(f"the checkpoint is of norm {state_dict['norm']!r}, here it is {self.norm!r}")
        check_names(self.names, list(state_dict["names"]))
        adam = copy.deepcopy(self._adam)
        adam.load_state_dict(state_dict["adam"])
        _radii_of(adam).copy_(state_dict["radii"])
        kind, loaded = self._anchor, self._anchors
        if state_dict["anchors"]:
            saved = [state_dict["anchors"][name] for name in self.names]
            told, found = state_dict.get("anchor_digests", {}), []
            for param, name, anchor in zip(self._params, self.names, saved, strict=True):
                check_loadable(param, f"parameter {name!r}", {"anchor": anchor})
                found.append((f"parameter {name!r}", {"anchor": anchor, "anchor_digest": told.get(name)}, None))
            digests.check_saved(found)
            kind = state_dict["anchor"]
            loaded = [copy_beside(p, anchor) for p, anchor in zip(self._params, saved, strict=True)]
        elif state_dict["anchor"] == "zero":
            kind, loaded = "zero", None
        self._adam, self._anchor, self._anchors, self._alphas = self._in_place(adam), kind, loaded, None
        self._started, self.calls = bool(state_dict["started"]), int(state_dict["calls"])
        self._feed = Feed(int(state_dict["taken"]))

    def _learn(self, loss_fn: Loss, batches: Iterable[Any], steps: int, progress: bool | None) -> Tensor:
        """Makes an `update`, and returns the norms of the weights."""
        check_number("steps", steps, COUNT)
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "an update differentiates the loss; call it outside torch.no_grad() and inference_mode()"
            )
        norms = self._norms()
        adam, feed = copy.deepcopy(self._adam), copy.copy(self._feed)
        radii = _radii_of(adam)
        self._begin(radii, norms)
        with as_found(self._model, self._params) as theta:
            for step in _bar(steps, progress):
                batch = feed.next(batches)
                if step:
                    put(self._params, theta)
                alphas = self._ball.alphas(radii, norms)
                with torch.no_grad():
                    self._ball.pull_(self._params, self._anchors, alphas)
                torch.clear_autocast_cache()
                evaluation_mode(self._model)
                dots = self._averaged(dots_of(loss_fn(batch), self._params, theta, self._anchors, self._ball))
                radii.grad = self._ball.slopes(radii, norms, dots) + self._penalty_slopes(radii, norms, alphas)
                adam.step()
                self._bound(radii, norms)
        radii.grad = None
        if not bool(radii.isfinite().all()):
            name = self.names[int((~radii.isfinite()).nonzero()[0])]
            raise FloatingPointError(
                f"the radius of parameter {name!r} is no longer finite, because the loss or its gradient is not; "
                "nothing has been changed"
            )
        self._adam, self._feed, self._started = self._in_place(adam), feed, True
        self._alphas = self._ball.alphas(radii, norms)
        return norms

    def _in_place(self, adam: torch.optim.Adam) -> torch.optim.Adam:
        """The same with its radii in the memory of ours, which CUDA graphs may have captured."""
        ours, radii = _radii_of(self._adam), _radii_of(adam)
        adam.param_groups[0]["params"] = [ours]
        if radii in adam.state:
            adam.state[ours] = adam.state.pop(radii)
        with torch.no_grad():
            ours.copy_(radii)
        return adam

    def _averaged(self, dots: Tensor) -> Tensor:
        """The mean over the replicas, each of which has its own batches."""
        if self._replicas is None:
            return dots
        torch.distributed.all_reduce(dots, group=self._replicas)
        return dots / torch.distributed.get_world_size(self._replicas)

    @torch.no_grad()
    def _project(self, norms: Tensor | None) -> None:
        norms = self._norms() if norms is None else norms
        radii = _radii_of(self._adam)
        self._begin(radii, norms)
        self._started = True
        self._alphas = self._ball.alphas(radii, norms)
        self._ball.pull_(self._params, self._anchors, self._alphas)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """The norms of the weights as they are now. Raises RuntimeError or ValueError if the weights no longer fit the
        anchors."""
        device = _radii_of(self._adam).device
        if moved := [name for name, p in zip(self.names, self._params, strict=True) if p.device != device]:
            raise RuntimeError(f"parameter {moved[0]!r} has left {device} since TPGM was made; make it after the move")
        as_lists(self._params, self._anchors)
        return self._ball.norms(self._params, self._anchors)

    def _begin(self, radii: Tensor, norms: Tensor) -> None:
        if not self._started:
            half = self._ball.smallest(norms) / 2
            radii.copy_(torch.where(half.isfinite(), half, 0.0))
        self._bound(radii, norms)

    def _bound(self, radii: Tensor, norms: Tensor) -> None:
        if self.clamp:
            largest = self._ball.largest(norms)
            radii.copy_(torch.where(radii > largest, largest, radii))
        radii.clamp_(min=FLOOR)

    def _penalty_slopes(self, radii: Tensor, norms: Tensor, alphas: Tensor) -> Tensor:
        """d/dγ of radius_penalty·‖γ‖² + tv·Σ|αᵢ − αᵢ₋₁|."""
        slopes = 2 * self.radius_penalty * radii
        if self.tv:
            left, right = self._neighbour_pairs
            mean = self._ball.mean(alphas)
            signs = (mean[right] - mean[left]).sign()
            pulls = torch.zeros_like(mean).index_add(0, right, signs).index_add(0, left, -signs)  # exact in any order
            slopes += self.tv * pulls * self._ball.mean(self._ball.rates(radii, norms))
        return slopes

    def _neighbours(self, groups: Sequence[str | Sequence[str]], names: Mapping[Tensor, list[str]]) -> list[Any]:
        """The indices of αᵢ₋₁ and αᵢ for each term of the total variation."""
        if self.tv and not groups:
            raise ValueError("tv needs groups: names or prefixes of the parameters to smooth along")
        places = {param: k for k, param in enumerate(self._params)}
        pairs: list[Any] = []
        for group in groups:
            members = [places[p] for p in dict.fromkeys(matching(group, names, "groups")) if p in places]
            if len(members) < 2:
                raise ValueError(f"the group {group!r} has {len(members)} trained parameters; it takes two to smooth")
            pairs += pairwise(members)
        return pairs


def _bar(steps: int, progress: bool | None) -> Iterable[int]:
    if progress is None:
        progress = steps >= LONG and sys.stderr.isatty() and find_spec("tqdm") is not None
    if not progress:
        return range(steps)
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(range(steps), desc="TPGM", unit="step")  # type: ignore[no-any-return]


def _radii_of(adam: torch.optim.Adam) -> Tensor:
    radii: Tensor = adam.param_groups[0]["params"][0]
    return radii
