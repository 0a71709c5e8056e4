"""Hyper-parameters on their way from the groups to the backends. They are read anew at each step."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.bases import Base, GroupSpec, hyper_of
from ..core.methods import METHOD_HYPER
from ..core.staging import staged

Groups = Sequence[Mapping[str, Any]]


class HyperTable:
    """The numbers of some groups for the backends.

    table: float64 on the CPU, one row a group, with the columns `base.hyper`.
    live: tensors on the device that hold numbers, by their place in the flat table, which has 0 there. It is for a
        backend that keeps addresses. The kernels read them, and the host does not.
    own: the groups of tensors that have a radius of their own. Each has a row after those of the groups.
    radii: theirs, a float64 each on the device. They are read at each step.
    """

    def __init__(
        self,
        base: Base,
        groups: Groups,
        specs: Sequence[GroupSpec],
        device: torch.device,
        *,
        addresses: bool,
        own: Sequence[int] = (),
        radii: Tensor | None = None,
    ) -> None:
        self._base, self._groups, self._specs, self._device = base, groups, specs, device
        self._own, self._radii = list(own), radii
        self.table = torch.zeros(len(groups) + len(own), len(base.hyper), dtype=torch.float64, device="cpu")
        self.live: dict[int, Tensor] = {}
        self._rows: list[list[float]] = []
        self._sent: Tensor | None = None  # what the groups' rows of the table are on the device
        for row, values in enumerate(self._read() if addresses else ()):
            for column, value in enumerate(values.values()):
                if _is_readable(value, device):
                    self.live[row * len(base.hyper) + column] = value
        self._read_radii = not addresses
        if addresses:
            self._share_live()
        self.refresh()

    def _share_live(self) -> None:
        """Has the rows of tensors with radii of their own read what their groups read, and their radii."""
        width, radius = len(self._base.hyper), self._base.hyper.index("radius")
        for k, group in enumerate(self._own):
            for column in range(width):
                if (value := self.live.get(group * width + column)) is not None:
                    self.live[(len(self._groups) + k) * width + column] = value
            assert self._radii is not None
            self.live[(len(self._groups) + k) * width + radius] = self._radii[k]

    def refresh(self) -> None:
        """Reads the groups, and writes the table if a number has changed."""
        width = len(self._base.hyper)
        rows = [
            [0.0 if row * width + k in self.live else float(value) for k, value in enumerate(values.values())]
            for row, values in enumerate(self._read())
        ]
        if rows != self._rows:
            self._rows, self._sent = rows, None
            self.table[: len(rows)] = torch.tensor(rows, dtype=torch.float64, device="cpu")
            self.table[len(rows) :] = self.table[self._own]

    def take_radii(self) -> None:
        """Reads the radii of tensors that have their own, for a backend that does not read them itself."""
        if self._radii is not None and self._read_radii:
            self.table[len(self._groups) :, self._base.hyper.index("radius")] = self._radii

    def numbers(self, column: str) -> Tensor:
        """One hyper-parameter of each group, float64 on the device. The host does not wait for those in tensors."""
        k, width = self._base.hyper.index(column), len(self._base.hyper)
        if self._sent is None:
            self._sent = staged(self.table[: len(self._groups)], self._device)
        values = self._sent[:, k]
        live = {row: self.live[row * width + k] for row in range(len(values)) if row * width + k in self.live}
        if live:
            values = values.clone()
            for row, number in live.items():
                values[row] = number.double().reshape(())
        return values

    def _read(self) -> list[dict[str, Any]]:
        return [hyper_of(group, self._base, spec) for group, spec in zip(self._groups, self._specs, strict=True)]


def _is_readable(value: object, device: torch.device) -> bool:
    """Whether kernels on this device can read the number at its address."""
    return isinstance(value, Tensor) and value.device == device and value.dtype in (torch.float32, torch.float64)


def terms_of(group: Mapping[str, Any], base: Base, spec: GroupSpec, device: torch.device) -> dict[str, float | Tensor]:
    """The hyper-parameters by which torch decides for a group. Those in tensors come as 0-d float64 on the device. The
    host does not wait for them."""
    values = hyper_of(group, base, spec)
    return {key: _number(values[key], device) for key in METHOD_HYPER}


def _number(value: Any, device: torch.device) -> float | Tensor:
    if isinstance(value, Tensor):
        return value.to(device, torch.float64, non_blocking=True).reshape(())
    return float(value)


def identities_of(group: Mapping[str, Any], base: Base, spec: GroupSpec) -> Hashable:
    """Which tensors hold hyper-parameters of a group, and where their memory is."""
    values = hyper_of(group, base, spec).items()
    return tuple((column, id(of), of.data_ptr()) for column, of in values if isinstance(of, Tensor))
