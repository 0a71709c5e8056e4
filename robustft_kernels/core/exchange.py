"""Numbers about tensors that are spread over processes, brought together from all of them."""

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .methods import Rule
from .sharding import first_row, has_whole_rows, is_dtensor, is_spread, local, mesh_of, weight
from .staging import staged

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Reach(Enum):
    """Where the segments of a tensor are."""

    HERE = "all of each is here, and the same in all processes that have it; or nothing of them is measured"
    ROWS = "segments are rows, and each lies whole in one process"
    CUT = "processes have parts of them"


def reach_of(param: Tensor, rule: Rule) -> Reach:
    """Where the segments are that a rule measures in a tensor."""
    if not rule.measures or not is_spread(param):
        return Reach.HERE
    return Reach.ROWS if rule.by_rows and has_whole_rows(param) else Reach.CUT


class Exchange:
    """All-reduces over some numbers, or rows of numbers, of each of some tensors. There is one packed one a mesh.

    A tensor that is not spread has the same numbers in every process. Every process gets the same bits.

    sizes: how many each tensor has.
    """

    def __init__(self, params: Sequence[Tensor], sizes: Sequence[int], device: torch.device) -> None:
        of_mesh: dict[Any, list[Tensor]] = {}
        weights: list[float] = []
        first = 0
        for param, size in zip(params, sizes, strict=True):
            of_mesh.setdefault(mesh_of(param), []).append(torch.arange(first, first + size, device="cpu"))
            weights += [weight(param)] * size
            first += size
        # The numbers of each mesh, and of no mesh. None is all.
        self._spread = [
            (mesh, staged(torch.cat(rows), device) if len(of_mesh) > 1 else None)
            for mesh, rows in of_mesh.items()
            if any(len(of) for of in rows)
        ]
        self._weights = None  # all count
        if any(of != 1 for of in weights):
            self._weights = staged(torch.tensor(weights, dtype=torch.float64, device="cpu"), device)

    def sum(self, table: Tensor) -> Tensor:
        """The sums over all parts, in place, of float64 or int64. Replicas count once."""
        if self._weights is not None:
            table *= self._weights.to(table.dtype).reshape(-1, *[1] * (table.dim() - 1))
        return self._reduce(table, "SUM")

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of all numbers over all parts. One number a mesh is exchanged."""
        counted = numbers if self._weights is None else numbers * self._weights
        total = counted.new_zeros(())
        for mesh, rows in self._spread:
            part = (counted if rows is None else counted[rows]).sum()
            if mesh is not None:
                all_reduce(part, mesh, "SUM")
            total = total + part
        return total

    def largest(self, table: Tensor) -> Tensor:
        """The largest numbers of all processes, in place."""
        return self._reduce(table, "MAX")

    def _reduce(self, table: Tensor, how: str) -> Tensor:
        for mesh, rows in self._spread:
            if mesh is None:
                continue
            if rows is None:
                all_reduce(table, mesh, how)
            else:
                packed = table[rows]
                all_reduce(packed, mesh, how)
                table[rows] = packed
        return table


class Segments:
    """The segments of tensors some of which are spread, each tensor under its own rule.

    counts: how many segments each tensor has, over all its parts.
    here: how many of them this process has a part of.

    A row may be here whole or in part. A tensor that is no DTensor is here whole, and the same in every process.
    """

    def __init__(self, params: Sequence[Tensor], rules: Sequence[Rule]) -> None:
        device = local(params[0]).device if params else torch.device("cpu")
        self.counts = [rule.segments_of(param.shape) for param, rule in zip(params, rules, strict=True)]
        self.here = [rule.segments_of(local(param).shape) for param, rule in zip(params, rules, strict=True)]
        places, start = [], 0
        for param, rule, n, whole in zip(params, rules, self.here, self.counts, strict=True):
            first = start + (first_row(param) if rule.by_rows and param.dim() > 1 else 0)
            places.append(torch.arange(first, first + n, device="cpu"))
            start += whole
        self._places = staged(torch.cat([*places, torch.zeros(0, dtype=torch.int64, device="cpu")]), device)
        self._exchange = Exchange(params, self.counts, device)

    def scattered(self, parts: Tensor) -> Tensor:
        """A table of all segments, [segments, k], with what is known of those here, [segments here, k]. Zero
        elsewhere."""
        table = parts.new_zeros(sum(self.counts), parts.shape[1])
        table[self._places] = parts
        return table

    def whole(self, parts: Tensor) -> Tensor:
        """The sums over all parts, [segments, k], from the sums over what is here, [segments here, k] in float64."""
        return self._exchange.sum(self.scattered(parts))

    def parts(self, whole: Tensor) -> Tensor:
        """What is known of the segments here, from what is known of all segments."""
        return whole[self._places]


def agree(flag: bool, params: Iterable[Tensor]) -> bool:
    """Whether a flag is set in all processes that have a part of any of these tensors."""
    for mesh in meshes_of(params):
        value = torch.tensor(float(flag), device="cpu")
        all_reduce(value, mesh, "MIN")
        flag = bool(value)
    return flag


def any_infinite(found_inf: Tensor, params: Iterable[Tensor]) -> Tensor:
    """`found_inf`, combined over the processes that have parts or replicas of these parameters."""
    found_inf = local(found_inf).clone()
    for mesh in dict.fromkeys(param.device_mesh for param in params if is_dtensor(param)):  # type: ignore[attr-defined]
        all_reduce(found_inf, mesh, "MAX")
    return found_inf


def meshes_of(params: Iterable[Tensor]) -> "list[DeviceMesh]":
    """The meshes that these tensors are spread over, equal ones once."""
    return list(dict.fromkeys(mesh for mesh in map(mesh_of, params) if mesh is not None))


def all_reduce(values: Tensor, mesh: "DeviceMesh", how: str) -> None:
    """An all-reduce over a mesh, in place. A single one does it if the mesh is the whole world or has one dimension.
    Values on another type of device, such as those of anchors in host memory, are brought to the mesh's and back."""
    import torch.distributed as dist

    if mesh.size() == 1:
        return
    op = getattr(dist.ReduceOp, how)
    there = values if values.device.type == mesh.device_type else values.to(mesh.device_type)
    if mesh.size() == dist.get_world_size():
        dist.all_reduce(there, op)
    else:
        for dim in range(mesh.ndim):
            dist.all_reduce(there, op, group=mesh.get_group(dim))
    if there is not values:
        values.copy_(there)
