"""The methods under comparison, a row each: what trains, and what happens around its steps."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

import robustft_kernels as rft

from .model import Net

Build = Callable[[Net, float], torch.optim.Optimizer]
Validation = tuple[Tensor, Tensor]
After = Callable[[int, int], None]  # of the step, from 1, and their number
Schedule = Callable[[torch.optim.Optimizer, int], Any]


@dataclass(frozen=True)
class Method:
    """phases: an optimizer for each equal share of the steps, of a model and a learning rate. around: what happens
    after each step, of the model and validation data. wise: the α of an interpolation afterwards. schedules: of an
    optimizer and its steps. joined: of the net before and `models` fine-tuned ones, which see the data in orders of
    their own, the state dict that they make together. fraction: PGM's radii are that of what a first run, by AdamW,
    deviates."""

    phases: tuple[Build, ...]
    around: Callable[[Net, Validation], After] | None = None
    wise: float = 1.0
    schedules: tuple[Schedule, ...] = (CosineAnnealingLR,)
    joined: Callable[[Net, list[Net]], Mapping[str, Any]] | None = None
    fraction: float = 0.0

    @property
    def models(self) -> int:
        """How many nets are trained."""
        return 3 if self.joined else 2 if self.fraction else 1

    def with_radii_of(self, free: Net, before: Net) -> "Method":
        radii = rft.suggest_radii(free, anchor=before.state_dict(), fraction=self.fraction)
        return replace(self, phases=(anchored(rft.AdamPGM, radius=radii),))


def _all(model: Net) -> list[dict[str, Any]]:
    """The features, and the fresh head, which has nothing to stay near."""
    named = list(model.named_parameters())
    of_head = {"params": [pair for pair in named if pair[0].startswith("head.")], "method": "none"}
    return [{"params": [pair for pair in named if not pair[0].startswith("head.")]}, of_head]


def anchored(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Build:
    return lambda model, lr: optimizer(_all(model), lr=lr, **options)


def chosen(groups: Callable[..., list[dict[str, Any]]]) -> Build:
    return lambda model, lr: torch.optim.AdamW(groups(model, "head"), lr=lr, weight_decay=0.0)


def adamw(model: Net, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def tpgm_once(model: Net, validation: Validation, **options: Any) -> After:
    """The paper's setting for ViTs: radii learned and applied once, after training."""
    learner = rft.TPGM(model, exclude=["head"], **options)

    def after(t: int, steps: int) -> None:
        if t == steps:
            learner.update(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), [validation], 200, progress=False)
            learner.project_()

    return after


def tpgm_each_step(model: Net, validation: Validation) -> After:
    """The paper's setting for ResNets."""
    learner = rft.TPGM(model, exclude=["head"], norm="mars")

    def after(t: int, steps: int) -> None:
        learner.step(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), [validation])

    return after


def falling(optimizer: torch.optim.Optimizer, steps: int) -> rft.StrengthScheduler:
    return rft.StrengthScheduler(optimizer, lambda t: 1 - t / steps)


def recalled(optimizer: torch.optim.Optimizer, steps: int) -> rft.RecAdamScheduler:
    """RecAdam's sigmoid, half of it at a quarter of the steps, with the cosine of the other methods."""
    return rft.RecAdamScheduler(
        optimizer, k=30 / steps, t0=steps / 4, lr_factor=lambda t: (1 + math.cos(math.pi * t / steps)) / 2
    )


def recadam(model: Net, lr: float) -> torch.optim.Optimizer:
    """γ·lr as in the paper: 5000·1e-5."""
    return rft.AdamL2SP(_all(model), lr=lr, strength=0.05 / lr)


probe = chosen(rft.linear_probe)
spd = anchored(rft.AdamSPD, strength=1.0)
METHODS = {
    "AdamW": Method((adamw,)),
    "LP": Method((probe,)),
    "LP-FT": Method((probe, adamw)),
    "BitFit": Method((chosen(rft.bitfit),)),
    "Partial fusion": Method((chosen(rft.partial_fusion),)),
    "L2-SP, λ=10": Method((anchored(rft.AdamL2SP, strength=10.0),)),
    "MARS-SP, λ=0.01": Method((anchored(rft.AnchoredAdamW, method="mars_sp", strength=0.01),)),
    "PGM, γ=0.3": Method((anchored(rft.AdamPGM, radius=0.3),)),
    "TPGM, once": Method((adamw,), tpgm_once),
    "TPGM-C, μ=0.004": Method((adamw,), partial(tpgm_once, radius_penalty=4e-3)),
    "TPGM, each step": Method((adamw,), tpgm_each_step),
    "FTP, k=1": Method((anchored(rft.AdamFTP),)),
    "AdamSPD, λ=1": Method((spd,)),
    "AdamSPD, λ=2": Method((anchored(rft.AdamSPD, strength=2.0),)),
    "WiSE-FT, α=0.5": Method((adamw,), wise=0.5),
    "WISE-SPD, α=0.5": Method((spd,), wise=0.5),
    "SPD, gate away, λ=0.5": Method((anchored(rft.AdamSPD, strength=0.5, gate="away"),)),
    "Cautious L2-SP, λ=10": Method((anchored(rft.AnchoredAdamW, method="l2sp_cautious", strength=10.0),)),
    "DiGraP, ω=1": Method((anchored(rft.AnchoredAdamW, method="digrap", strength=1.0),)),
    "L2-SP, λ from 20 to 0": Method((anchored(rft.AdamL2SP, strength=20.0),), schedules=(CosineAnnealingLR, falling)),
    "RecAdam": Method((recadam,), schedules=(recalled,)),
    "Soup, 3 models": Method((adamw,), joined=lambda before, models: rft.soup(models)),
    "Model Stock, 3 models": Method((adamw,), joined=rft.model_stock),
}
# What only --methods asks for: moments in 8 bits, grids of strengths, and radii of a free run.
MORE = {
    "AdamW, 8 bits": Method((anchored(rft.AnchoredAdamW, method="none", state_dtype="8bit"),)),
    "AdamSPD, λ=1, 8 bits": Method((anchored(rft.AdamSPD, strength=1.0, state_dtype="8bit"),)),
    **{f"L2-SP, λ={x:g}": Method((anchored(rft.AdamL2SP, strength=x),)) for x in (1.0, 3.0, 30.0, 100.0, 300.0)},
    **{
        f"Cautious L2-SP, λ={x:g}": Method((anchored(rft.AnchoredAdamW, method="l2sp_cautious", strength=x),))
        for x in (3.0, 30.0, 100.0)
    },
    **{f"PGM, γ={x:g}": Method((anchored(rft.AdamPGM, radius=x),)) for x in (0.1, 1.0)},
    **{f"PGM, {x:g} of a free run": Method((), fraction=x) for x in (0.25, 0.5)},
}
