"""A program, run by test_spread.py: what several processes do when one lacks something, asks alone, or dies."""

import argparse
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import robustft_kernels as rft

from .processes import parser, randn, spawn

SHAPES = {"a": (8, 6), "b": (8, 6), "c": (5,), "d": (9, 3)}
Make = Callable[[Any], Any]
KINDS: dict[str, Make] = {
    "spd": lambda named: rft.AdamSPD(named, lr=1e-2),
    "l2sp": lambda named: rft.AdamL2SP(named, lr=1e-2),
    "rows": lambda named: rft.AdamPGM(named, lr=1e-1, radius=0.05, norm="mars_rows"),
    "mars": lambda named: rft.AdamPGM(named, lr=1e-1, radius=0.05, norm="mars"),
    "mars_sp": lambda named: rft.AnchoredAdamW(named, lr=1e-1, method="mars_sp", strength=0.3),
    "ftp": lambda named: rft.AdamFTP(named, lr=1e-2, radius_lr=0.1),
    "clipped": lambda named: rft.AdamSPD(named, lr=1e-2, max_grad_norm=0.1),
    "around": lambda named: rft.Anchored(torch.optim.AdamW(named, lr=1e-1), "project", norm="mars", radius=0.05),
    "around spd": lambda named: rft.Anchored(torch.optim.AdamW(named, lr=1e-1), strength=1.3),
}


class Run:
    """An optimizer over sharded parameters, and the same gradients in every process."""

    def __init__(self, kind: str, names: str = "abcd") -> None:
        self.mesh = init_device_mesh(torch.get_default_device().type, (dist.get_world_size(),))
        generator = torch.Generator().manual_seed(0)
        start = {name: randn(shape, generator) for name, shape in SHAPES.items()}
        self.params = {name: nn.Parameter(self.spread(of)) for name, of in start.items()}
        self.optimizer = KINDS[kind]([(name, self.params[name]) for name in names])

    def spread(self, of: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(of.clone(), self.mesh, [Shard(0)], src_data_rank=None)

    def give_grads(self, t: int) -> None:
        generator = torch.Generator().manual_seed(100 + t)
        for name, param in self.params.items():
            away = param.full_tensor().detach() * (-1) ** t
            param.grad = self.spread(randn(SHAPES[name], generator) + 0.5 * away)

    def steps(self, *of: int) -> None:
        for t in of:
            self.give_grads(t)
            self.optimizer.step()

    def bits(self) -> list[torch.Tensor]:
        kept = [value for of in self.optimizer.state.values() for value in of.values()]
        tensors = [*self.params.values(), *(value for value in kept if isinstance(value, torch.Tensor))]
        return [getattr(of, "_local_tensor", of).detach().clone() for of in tensors]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def disagreeing(kind: str) -> None:
    """All processes raise the same message, and nothing is changed. Once they agree again, all goes on."""
    rank = dist.get_rank()
    run, undisturbed = Run(kind), Run(kind)
    run.steps(7)
    undisturbed.steps(7)
    for t in range(4):
        run.give_grads(t)
        undisturbed.steps(t)
        lacking = ("b", "ad"[rank], "d", "b")[t]
        before, grad = run.bits(), run.params[lacking].grad
        if rank == 1 or t == 1:
            run.params[lacking].grad = None
        first = "a" if t == 1 else lacking
        with pytest.raises(RuntimeError, match=f"parameter '{first}' has a gradient in some processes of its mesh"):
            run.optimizer.step()
        assert same(before, run.bits()), (kind, t)
        run.params[lacking].grad = grad
        run.optimizer.step()
        assert same(run.bits(), undisturbed.bits()), (kind, t)
    run = Run(kind, "abcd" if rank else "bacd")
    before = list(run.params.values())
    with pytest.raises(RuntimeError, match=r"number 0 of their sharded parameters is parameter '[ab]' .* in some"):
        run.steps(0)
    assert same([p.to_local() for p in before], [p.to_local() for p in Run(kind).params.values()])


def asking_alone(kind: str) -> None:
    """One process asks for telemetry and the state, and the others do not. Nobody waits, and the answer is the same as
    if all had asked."""
    run, together = Run(kind), Run(kind)
    if dist.get_rank() == 0:
        run.optimizer.telemetry()
    for t in range(3):
        run.steps(t)
        together.steps(t)
        told = repr(together.optimizer.telemetry())
        if dist.get_rank() == 1:
            assert repr(run.optimizer.telemetry()) == told
            run.optimizer.state_dict()
    assert same(run.bits(), together.bits())


@contextmanager
def noted(calls: list[torch.Tensor]) -> Iterator[None]:
    """Notes what is sent by all-reduces."""
    reduce = dist.all_reduce

    def noting(values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(values.clone())
        return reduce(values, *args, **kwargs)

    dist.all_reduce = noting
    yield
    dist.all_reduce = reduce


LLAMA_7B = [*[(4096, 1)] * 5 * 32, *[(11008, 1)] * 2 * 32, *[(32000, 1)] * 2, *[(2,)] * 65]  # rows of its matrices


def little_is_exchanged() -> None:
    """Rows stay where they are: for those of LLaMA-7B, 10 kB a step go over the wire. No process keeps a number for a
    row that is elsewhere."""
    mesh = init_device_mesh(torch.get_default_device().type, (dist.get_world_size(),))
    for cls, kwargs in (
        (rft.AdamFTP, dict(max_grad_norm=1.0)),
        (rft.AdamSPD, {}),
        (rft.AdamSPD, dict(norm="mars_rows")),
        (rft.AdamPGM, dict(radius=0.1, norm="mars")),
        (rft.AdamPGM, dict(radius=0.1, norm="mars_rows")),
        (rft.AnchoredAdamW, dict(method="mars_sp")),
    ):
        whole = [torch.ones(shape) for shape in LLAMA_7B]
        params = [nn.Parameter(distribute_tensor(of, mesh, [Shard(0)], src_data_rank=None)) for of in whole]
        optimizer = cls(params, **kwargs)
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, 0.1)
            calls: list[torch.Tensor] = []
            with noted(calls):
                optimizer.step()
        sent = sum(of.numel() * of.element_size() for of in calls)
        assert 0 < sent <= 10_000, (cls, kwargs, sent)
        rows = sum(p.to_local().shape[0] for p in params) + len(params)
        assert len(optimizer._plans.current.launches[0].results) <= rows, (cls, kwargs)


def dies(rank: int, store: str, kind: str, at: int, told: Any) -> None:
    """The last process dies in the at-th all-reduce of a step. The other one makes no step, or knows that its step is
    not whole, until it loads a checkpoint."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=2, rank=rank, timeout=timedelta(seconds=20))
    run = Run(kind)
    run.steps(0, 1)
    run.give_grads(2)
    saved, before = run.optimizer.state_dict(), run.bits()
    calls, reduce = 0, dist.all_reduce

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return reduce(*args, **kwargs)

    dist.all_reduce = deadly
    try:
        run.optimizer.step()
    except RuntimeError:
        if same(before, run.bits()):
            run.optimizer.state_dict()
            told.put("no step")
        else:
            for use in (run.optimizer.step, run.optimizer.state_dict):
                with pytest.raises(RuntimeError, match=r"broken off half-way.*load the last checkpoint"):
                    use()
            run.optimizer.load_state_dict(saved)
            run.optimizer.state_dict()
            told.put("known")
    else:
        told.put("whole")
    told.close()
    told.join_thread()
    os._exit(0)


def dying(folder: Path) -> None:
    forked = multiprocessing.get_context("fork")
    for kind in KINDS:
        outcomes = []
        while "whole" not in outcomes:
            at = len(outcomes) + 1
            told = forked.Queue()
            args = (str(folder / f"{kind} {at}"), kind, at, told)
            both = [forked.Process(target=dies, args=(rank, *args)) for rank in range(2)]
            for process in both:
                process.start()
            outcomes.append(told.get(timeout=60))
            for process in both:
                process.join()
        assert outcomes[0] == "no step", (kind, outcomes)  # what is compared first
        print(kind, outcomes)


def main(args: argparse.Namespace) -> None:
    for kind in KINDS:
        disagreeing(kind)
        asking_alone(kind)
    little_is_exchanged()


if __name__ == "__main__":
    options = parser()
    options.add_argument("--folder", default="")
    given = options.parse_args()
    if given.folder:
        dying(Path(given.folder))
    else:
        spawn(main, given)
