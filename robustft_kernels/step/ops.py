"""A step as ops of torch.library, for tracing.

There is one op a base, and one overload a backend:

    robustft::adamw_.native(Tensor(a!)[] params, Tensor[] grads, Tensor[] anchors, Tensor(b!)[] exp_avgs, ...) -> ()

An op takes the tables of `contract.StepTable` as flat lists. `group_sizes` says how many consecutive params share a row
of `hyper` and a rule. Only some params need an entry in anchors, max_exp_avg_sqs and the like. Such a list has entries
for those params alone, in their order. seeds has one entry for each param, or none if nothing is rounded
stochastically.

The optimizers do not go through the dispatcher. It costs a third of a microsecond for each tensor of each list: 4 ms a
step for 2,000 tensors. They call the same implementation, prepared.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from ..core.bases import BASES, Base, spec_of_hyper
from ..core.contract import StepTable, StepTensors
from ..core.eight_bit import EIGHT_BIT


def schema_of(base: Base, overload: str) -> str:
    """The schema of a base's op."""
    mutated = ["params", *(f"{key}s" for key in base.state), "steps", "results", "alphas"]
    alias = {name: f"Tensor({chr(ord('a') + i)}!)" for i, name in enumerate(mutated)}
    lists = "".join(f"{alias[f'{key}s']}[] {key}s, " for key in base.state)
    return (
        f"{base.name}_.{overload}({alias['params']}[] params, Tensor[] grads, Tensor[] anchors, {lists}"
        f"{alias['steps']}[] steps, {alias['results']} results, {alias['alphas']} alphas, "
        "Tensor hyper, int[] group_sizes, str[] rules, int[] seeds, "
        "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
    )


def table_of(base: Base, params: Sequence[Tensor], *lists: Any) -> StepTable:
    """The table that an op's lists, from `anchors` to `seeds`, stand for. Raises ValueError naming the list that does
    not fit the groups."""
    anchors, *states, steps, results, alphas, hyper, group_sizes, rules, seeds = lists
    if hyper.dim() != 2 or hyper.shape[1] != len(base.hyper) or not len(hyper) == len(group_sizes) == len(rules):
        raise ValueError(
            f"robustft: hyper must have a row for each of {len(group_sizes)} groups and {len(base.hyper)} columns, and "
            f"each group a rule; got the shape {tuple(hyper.shape)} and {len(rules)} rules"
        )
    if seeds and len(seeds) != len(params):
        raise ValueError(f"robustft: seeds has {len(seeds)} entries for {len(params)} params; give one each, or none")
    names = ("params", "anchors", *(f"{key}s" for key in base.state), "steps")
    feeds = {name: _Feed(name, of) for name, of in zip(names, (params, anchors, *states, steps), strict=True)}
    tensors: list[StepTensors] = []
    for row, (values, size, rule) in enumerate(zip(hyper.tolist(), group_sizes, rules, strict=True)):
        spec = spec_of_hyper(base, dict(zip(base.hyper, values, strict=True)), rule)
        for _ in range(size):
            param = feeds["params"].next()
            state = {}
            for key, needed in base.state.items():
                if needed(spec, param):
                    state[key] = feeds[f"{key}s"].next()
                    if state[key].dtype == torch.int8:  # then a list of scales follows
                        spec = replace(spec, state_dtype=EIGHT_BIT)
            tensors.append(
                StepTensors(
                    spec,
                    row,
                    param,
                    feeds["anchors"].next() if spec.anchored else None,
                    state,
                    feeds["steps"].next() if base.counted(spec, param) else None,
                    seeds[len(tensors)] if seeds else 0,
                )
            )
    for feed in feeds.values():
        feed.check_all_taken()
    return StepTable(base, tensors, hyper, results, alphas)


class _Feed:
    """A list whose entries are taken one by one, because not every parameter has one."""

    def __init__(self, name: str, entries: Sequence[Tensor]) -> None:
        self._name, self._entries, self._at = name, entries, 0

    def next(self) -> Tensor:
        if self._at == len(self._entries):
            raise ValueError(f"robustft: {self._name} has {self._at} entries, too few for the groups")
        self._at += 1
        return self._entries[self._at - 1]

    def check_all_taken(self) -> None:
        if self._at < len(self._entries):
            raise ValueError(f"robustft: {self._name} has {len(self._entries)} entries; the groups take {self._at}")


def _define(library: torch.library.Library, base: Base, backend: str) -> None:
    def run(params: list[Tensor], grads: list[Tensor], *args: Any) -> None:
        lists = len(base.state) + 8  # anchors to seeds. After them, the dispatcher leaves out what has its default
        registry.prepare(backend, table_of(base, params, *args[:lists]))(grads, *args[lists:])

    def fake(*_: Any) -> None:
        return None

    name = f"{base.name}_.{backend}"
    library.define(schema_of(base, backend))
    library.impl(name, run, "CPU" if backend == "native" else "CompositeExplicitAutograd")
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"robustft::{name}", fake, lib=library)


_library = torch.library.Library("robustft", "DEF")
for _backend in registry.BACKENDS:
    for _base in BASES:
        _define(_library, _base, _backend)
