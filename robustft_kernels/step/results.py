"""What the steps leave of each parameter: the results and alphas of its segments."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.contract import empty_results
from ..core.methods import MEASURES
from ..core.staging import staged

DOT = MEASURES.index("grad_dot_delta")


class Found(NamedTuple):
    """What the steps left of one parameter.

    results, alphas: as in `contract.StepTable`. If its rows lie in several processes, each row whole in one, these are
        the rows here.
    told: of such a parameter, over all processes: its deviation, its mean α, the share of its rows with α ≠ 1 in the
        last step, and in how many steps α was not 1, and ⟨g,d⟩ above 0, both as the mean over its rows.
    """

    results: Tensor
    alphas: Tensor
    told: Tensor | None = None


class Place(NamedTuple):
    """Where the rows of a parameter are: those of its segments, and after all segments the one that is told."""

    first: int
    segments: int
    told: int | None


class Tables:
    """The tables of one launch, which its backend writes.

    results, alphas: as in `contract.StepTable`, in the order of the launch's parameters.
    told: one row for each parameter that has one, see `Found`.
    """

    def __init__(self, params: Sequence[Tensor], places: Sequence[Place], device: torch.device) -> None:
        self.params, self.places = params, places
        segments = sum(place.segments for place in places)
        rows = [torch.arange(place.first, place.first + place.segments, device="cpu") for place in places]
        rows += [torch.tensor([place.told], device="cpu") for place in places if place.told is not None]
        self.index = staged(torch.cat([*rows, torch.zeros(0, dtype=torch.int64, device="cpu")]), device)
        results, alphas = empty_results(len(self.index), device)
        self.results, self.alphas, self.told = results[:segments], alphas[:segments], results[segments:]
        self.lent = False
        self._here: dict[Tensor, Place] = {}
        first = told = 0
        for param, place in zip(params, places, strict=True):
            self._here[param] = Place(first, place.segments, None if place.told is None else told)
            first, told = first + place.segments, told + (place.told is not None)

    def of(self, param: Tensor) -> Found:
        """What they have of a parameter."""
        first, count, told = self._here[param]
        rows = slice(first, first + count)
        return Found(self.results[rows], self.alphas[rows], None if told is None else self.told[told])


class Results(Mapping[Tensor, Found]):
    """What the steps left of all parameters that were ever stepped.

    Each launch has tables of its own. They are lent the rows of their parameters, until other tables ask for some.
    """

    def __init__(self) -> None:
        self._store: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._places: dict[Tensor, Place] = {}
        self._lent: dict[Tensor, Tables] = {}

    def tables(
        self, params: Sequence[Tensor], counts: Sequence[int], told: Sequence[bool], device: torch.device
    ) -> Tables:
        """Tables for a launch in which each parameter has as many segments as `counts` says, and perhaps a row in
        `told`. They are to be lent before they are used."""
        end = len(self._store[device][0]) if device in self._store else 0
        places = []
        for param, count, extra in zip(params, counts, told, strict=True):
            known = self._places.get(param)
            if known is None or (known.segments, known.told is not None) != (count, extra):
                known = Place(end, count, end + count if extra else None)
                end += count + extra
            places.append(known)
        old = self._store.get(device, empty_results(0, device))
        new = empty_results(end - len(old[0]), device)
        self._store[device] = torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]])
        return Tables(params, places, device)

    def lend(self, tables: Tables) -> None:
        """Brings the rows of a launch's parameters to its tables."""
        if tables.lent:
            return
        for other in {self._lent[param] for param in tables.params if param in self._lent}:
            self._take_back(other)
        results, alphas = self._store[tables.index.device]
        rows, segments = results[tables.index], len(tables.results)
        tables.results.copy_(rows[:segments])
        tables.told.copy_(rows[segments:])
        tables.alphas.copy_(alphas[tables.index[:segments]])
        tables.lent = True
        self._lent.update(dict.fromkeys(tables.params, tables))
        self._places.update(zip(tables.params, tables.places, strict=True))

    def _take_back(self, tables: Tables) -> None:
        results, alphas = self._store[tables.index.device]
        results[tables.index] = torch.cat([tables.results, tables.told])
        alphas[tables.index[: len(tables.alphas)]] = tables.alphas
        tables.lent = False
        for param in tables.params:
            del self._lent[param]

    def only(self, params: set[Tensor]) -> "Results":
        """Those of these parameters. The tables of all launches are void if there were others."""
        if self._places.keys() <= params:
            return self
        kept = Results()
        by_device: dict[torch.device, dict[Tensor, Found]] = {}
        for param in self._places.keys() & params:
            by_device.setdefault(param.device, {})[param] = self[param]
        for device, found in by_device.items():
            counts, told = [len(of.results) for of in found.values()], [of.told is not None for of in found.values()]
            tables = kept.tables(list(found), counts, told, device)
            kept.lend(tables)
            for param, of in found.items():
                for new, old in zip(tables.of(param), of, strict=True):
                    if new is not None and old is not None:
                        new.copy_(old)
        return kept

    def __getitem__(self, param: Tensor) -> Found:
        if param in self._lent:
            return self._lent[param].of(param)
        (first, count, told), (results, alphas) = self._places[param], self._store[param.device]
        rows = slice(first, first + count)
        return Found(results[rows], alphas[rows], None if told is None else results[told])

    def __contains__(self, param: object) -> bool:
        return param in self._places

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write(tables: Tables, sums: Tensor, decided: Tensor, found_inf: Tensor | None) -> None:
    """Writes the sums of the measures and the decided alphas, as a step in one sweep does, and counts the steps.
    Nothing changes when `found_inf` is not 0."""
    n, results, alphas = len(MEASURES), tables.results, tables.alphas
    counted = results[:, n:] + torch.stack([decided != 1, sums[:, DOT] > 0], 1)
    results.copy_(unless(found_inf, torch.cat([sums, counted], 1), results))
    alphas.copy_(unless(found_inf, decided, alphas))


def unless(found_inf: Tensor | None, value: Tensor, old: Tensor) -> Tensor:
    """`value`, but `old` when `found_inf` is not 0."""
    return value if found_inf is None else torch.where(found_inf != 0, old, value)
