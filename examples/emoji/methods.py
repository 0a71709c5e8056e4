"""The methods under comparison, one row each: what trains, with which optimizer, and what happens around the steps."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

import robustft_kernels as rft

from .model import Encoder
from .task import Task

Named = list[tuple[str, Tensor]]
Hook = Callable[[int, int], None]  # after step t of T, counted from 1


@dataclass(frozen=True)
class Method:
    """optimizer: from named parameters, learning rate and strength.

    strengths: the grid of the method's one knob, whatever it is; one value where there is none.
    trains: endings of the names of the parameters that train; all others stay as pre-trained.
    probe: whether the first half of the steps trains the projection alone (LP-FT).
    around: made before the first step from model, task and strength; what it returns is called after every step.
    wise: the name under which the result, interpolated with the pre-trained weights (WiSE-FT), is listed too.
    """

    optimizer: Callable[[Named, float, float], Optimizer]
    strengths: tuple[float, ...] = (0.0,)
    trains: tuple[str, ...] = ("",)
    probe: bool = False
    around: Callable[[Encoder, Task, float], Hook] | None = None
    wise: str | None = None


def plain(named: Named, lr: float, strength: float) -> Optimizer:
    return rft.AnchoredAdamW(named, lr=lr)


def anchored(method: str) -> Callable[[Named, float, float], Optimizer]:
    return lambda named, lr, strength: rft.AnchoredAdamW(named, lr=lr, method=method, strength=strength)


HEAD = ("projection.weight",)
ALPHAS = (0.25, 0.5, 0.75)  # of WiSE-FT: 0 is the pre-trained model, 1 the fine-tuned one

METHODS: dict[str, Method] = {
    "AdamW": Method(plain, wise="WiSE-FT"),
    "LP": Method(plain, trains=HEAD),
    "LP-FT": Method(plain, probe=True),
    "BitFit": Method(plain, trains=(".bias", *HEAD)),
    "Partial fusion": Method(plain, trains=(".scale", ".bias", *HEAD)),
    "L2-SP": Method(anchored("l2sp"), strengths=(10.0, 30.0, 100.0)),
    "SPD": Method(anchored("spd"), strengths=(0.5, 1.0, 2.0), wise="WISE-SPD"),
}
