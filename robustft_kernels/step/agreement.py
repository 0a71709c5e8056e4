"""Whether the processes that have parts of the same tensors are about to make the same step with them."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends import digests
from ..core.bases import Group, GroupSpec
from ..core.contract import StepTensors
from ..core.exchange import all_reduce
from ..core.sharding import is_spread, mesh_of
from . import anchor_sizes
from .launch import label_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Line = tuple[str, str, bool]  # what a parameter is called, what is done with it, whether it has a gradient


class Agreement:
    """Compares names, shapes, placements, methods and which gradients there are, over each mesh. Then measures and
    digests the anchors that are spread, once. Telemetry and checkpoints need not ask other processes for that.

    tensors: those that are stepped.

    On the CPU each step is compared. On a GPU the host would wait for that, so a plan is compared when it is used after
    another one.
    """

    def __init__(self, groups: Sequence[Group], specs: Sequence[GroupSpec], tensors: Iterable[StepTensors]) -> None:
        of_meshes: dict[DeviceMesh, list[Line]] = {}
        for group, spec in zip(groups, specs, strict=True):
            for k, param in enumerate(group["params"]):
                if (mesh := mesh_of(param)) is not None:
                    form = f"{spec.rule.name}, shape {tuple(param.shape)}, {param.placements}, {param.dtype}"
                    of_meshes.setdefault(mesh, []).append((label_of(group, k), form, param.grad is not None))
        self._of_meshes = [(mesh, lines, _number_of(lines)) for mesh, lines in of_meshes.items()]
        self._known = self._measured = False
        self._anchors: dict[tuple[str, torch.device], list[Tensor]] = {}  # by norm, and by where they are kept
        for of in tensors:
            if of.anchor is not None and is_spread(of.anchor):
                norm = "mars" if of.spec.rule.crosses_rows else "l2"
                self._anchors.setdefault((norm, of.anchor.device), []).append(of.anchor)

    def renew(self) -> None:
        """Has the next step compared on a GPU too."""
        self._known = False

    def check(self) -> None:
        """Raises RuntimeError in all processes of a mesh, naming the first parameter that they disagree about."""
        if self._compare(unmeasured=not self._measured and self._lacks_sizes()):
            for (norm, _), anchors in self._anchors.items():
                anchor_sizes.measure(anchors, norm)
            digests.digests([of for anchors in self._anchors.values() for of in anchors], anew=True)
        self._measured = True

    def _lacks_sizes(self) -> bool:
        return any(
            anchor_sizes.known_size(of, norm) is None for (norm, _), some in self._anchors.items() for of in some
        )

    def _compare(self, *, unmeasured: bool) -> bool:
        """Whether any of the processes has not measured its anchors yet."""
        anywhere = False
        for mesh, lines, number in self._of_meshes:
            if self._known and mesh.device_type != "cpu":
                continue
            bounds = torch.tensor([number, -number, float(unmeasured)], dtype=torch.float64, device="cpu")
            all_reduce(bounds, mesh, "MAX")
            most, least, anyone = bounds.tolist()
            if most != number or -least != number:
                raise RuntimeError(_difference(_gathered(lines, mesh)))
            anywhere |= anyone > 0
        self._known = True
        return anywhere


def _number_of(lines: list[Line]) -> float:
    """A whole number that float64 holds, another one for other lines."""
    return float(int.from_bytes(hashlib.sha256(repr(lines).encode()).digest()[:6], "big"))


def _gathered(lines: list[Line], mesh: "DeviceMesh") -> list[list[Line]]:
    """The lines of all processes of a mesh."""
    import torch.distributed as dist

    everything = [lines]
    for dim in range(mesh.ndim):
        of_dim: list[list[list[Line]]] = [[]] * mesh.size(dim)
        dist.all_gather_object(of_dim, everything, group=mesh.get_group(dim))
        everything = [of for part in of_dim for of in part]
    return everything


def _difference(everything: list[list[Line]]) -> str:
    """What to say about the first line in which processes differ."""
    for k in range(max(map(len, everything))):
        at = [lines[k] if k < len(lines) else ("no parameter", "", False) for lines in everything]
        if len({line[:2] for line in at}) > 1:
            one, other = list(dict.fromkeys(f"{name} ({form})" for name, form, _ in at))[:2]
            return (
                f"the processes make different steps: number {k} of their sharded parameters is {one} in some of them, "
                f"and {other} in others; give all the same parameters, groups and methods in the same order"
            )
        if len({line[2] for line in at}) > 1:
            without = [str(place) for place, line in enumerate(at) if not line[2]]
            return (
                f"{at[0][0]} has a gradient in some processes of its mesh, but none in number {', '.join(without)}; "
                "give it one of zeros there, or none in all of them"
            )
    return "the processes make different steps"
