"""The methods under comparison, one row each: what trains, with which optimizer, and what happens around the steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

import robustft_kernels as rft

from .model import Encoder
from .task import Task

Named = list[tuple[str, Tensor]]
Hook = Callable[[], None]


@dataclass(frozen=True)
class Afterwards:
    """A method that starts from what another has fine-tuned: `change` is made in place, of encoder, task, strength."""

    change: Callable[[Encoder, Task, float], None]
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Method:
    """optimizer: from named parameters, learning rate and strength.

    strengths: the grid of the method's one knob, whatever it is (λ, γ, k, μ, α); one value where there is none.
    sweep: more of them, at the learning rate of the sweep alone.
    trains: endings of the names of the parameters that train; all others stay as pre-trained.
    probe: whether the first half of the steps trains the projection alone (LP-FT).
    around: made of encoder and task before the first step; what it returns is called after every step.
    afterwards: methods that go on from here, by name.
    joined: methods that make one encoder of three, by name: of the pre-trained one and of three that are fine-tuned
        alike, but for the order of the data. This method then has no row of its own.
    """

    optimizer: Callable[[Named, float, float], Optimizer]
    strengths: tuple[float, ...] = (0.0,)
    sweep: tuple[float, ...] = ()
    trains: tuple[str, ...] = ("",)
    probe: bool = False
    around: Callable[[Encoder, Task], Hook] | None = None
    afterwards: Mapping[str, Afterwards] = field(default_factory=dict)
    joined: Mapping[str, Callable[[Encoder, list[Encoder]], Mapping[str, Any]]] = field(default_factory=dict)


def plain(named: Named, lr: float, strength: float) -> Optimizer:
    return rft.AnchoredAdamW(named, lr=lr)


def held(method: str, knob: str = "strength", **options: Any) -> Callable[[Named, float, float], Optimizer]:
    return lambda named, lr, strength: rft.AnchoredAdamW(named, lr=lr, method=method, **{knob: strength}, **options)


def interpolate(encoder: Encoder, task: Task, alpha: float) -> None:
    rft.wise_ft_(encoder, task.start.state_dict(), alpha)


def learn_radii(encoder: Encoder, task: Task, penalty: float) -> None:
    """TPGM as the paper sets it for ViTs, once after training."""
    learner = rft.TPGM(encoder, anchor=dict(task.start.named_parameters()), lr=5e-2, radius_penalty=penalty)
    learner.update(_loss(encoder, task), task.batches(VALIDATION_BATCH), RADIUS_STEPS, progress=False)
    learner.project_()


def learn_radii_along(encoder: Encoder, task: Task) -> Hook:
    """TPGM as the paper sets it for ResNets: after every step, by the largest row."""
    learner = rft.TPGM(encoder, norm="mars")
    batches = task.batches(VALIDATION_BATCH)

    def after() -> None:
        learner.step(_loss(encoder, task), [batches[learner.calls % len(batches)]])

    return after


def _loss(encoder: nn.Module, task: Task) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda batch: task.loss(encoder(batch[0]), batch[1])


HEAD = ("projection.weight",)
RADIUS_STEPS = 40  # of 5e-2 reach as far as the paper's 200 of 1e-2
VALIDATION_BATCH = 57  # a third of the 171 images
WISE = Afterwards(interpolate, (0.25, 0.5, 0.75))  # 0 is the pre-trained encoder, 1 the fine-tuned one

METHODS: dict[str, Method] = {
    "AdamW": Method(
        plain,
        afterwards={
            "WiSE-FT": WISE,
            "TPGM": Afterwards(learn_radii, (0.0,)),
            "TPGM-C": Afterwards(learn_radii, (1e-4, 1e-3, 4e-3)),
        },
    ),
    "LP": Method(plain, trains=HEAD),
    "LP-FT": Method(plain, probe=True),
    "BitFit": Method(plain, trains=(".bias", *HEAD)),
    "Partial fusion": Method(plain, trains=(".scale", ".bias", *HEAD)),
    "L2-SP": Method(held("l2sp"), strengths=(10.0, 30.0, 100.0), sweep=(1.0, 3.0, 300.0)),
    "MARS-SP": Method(held("mars_sp"), strengths=(1e-2, 1e-1)),
    "PGM": Method(held("project", "radius"), strengths=(0.1, 0.3, 1.0)),
    "TPGM, each step": Method(plain, around=learn_radii_along),
    "FTP": Method(held("ftp", "k"), strengths=(0.0, 1.0)),
    "SPD": Method(held("spd"), strengths=(0.5, 1.0, 2.0), sweep=(0.1, 0.25, 4.0), afterwards={"WISE-SPD": WISE}),
    "SPD, gate away": Method(held("spd", gate="away"), strengths=(0.25, 0.5, 1.0)),
    "Cautious L2-SP": Method(held("l2sp_cautious"), strengths=(10.0, 30.0, 100.0)),
    "DiGraP": Method(held("digrap"), strengths=(0.5, 1.0)),
    "AdamW, 3 times": Method(
        plain, joined={"Soup": lambda _, models: rft.soup(models), "Model Stock": rft.model_stock}
    ),
}
