"""What the steps leave for each parameter: the results and alphas of its segments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.contract import empty_results
from ..core.methods import MEASURES

Results = dict[Tensor, tuple[Tensor, Tensor]]  # of each parameter: rows of results, alphas


def carried_over(
    params: Sequence[Tensor], counts: Sequence[int], device: torch.device, known: Results
) -> tuple[Tensor, Tensor]:
    """Tables for a launch in which each parameter has as many segments as `counts` says. They start with the rows that
    `known` has for these parameters. `known` then refers to the new tables."""
    results, alphas = empty_results(sum(counts), device)
    for param, *new in zip(params, results.split(list(counts)), alphas.split(list(counts)), strict=True):
        for of_new, of_old in zip(new, known.get(param, ()), strict=False):
            if of_old.shape == of_new.shape:
                of_new.copy_(of_old)
        known[param] = (new[0], new[1])
    return results, alphas


def write(results: Tensor, alphas: Tensor, sums: Tensor, decided: Tensor, found_inf: Tensor | None) -> None:
    """Writes the sums of the measures and the decided alphas, as a step in one sweep does, and counts the pulls.
    Nothing changes when `found_inf` is not 0."""
    n = len(MEASURES)
    counted = (results[:, n] + (decided != 1))[:, None]
    results.copy_(unless(found_inf, torch.cat([sums, counted], 1), results))
    alphas.copy_(unless(found_inf, decided, alphas))


def unless(found_inf: Tensor | None, value: Tensor, old: Tensor) -> Tensor:
    """`value`, but `old` when `found_inf` is not 0."""
    return value if found_inf is None else torch.where(found_inf != 0, old, value)
