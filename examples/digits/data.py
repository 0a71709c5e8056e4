"""Scikit-learn's handwritten digits in eight domains: images (n, 1, 8, 8) in [0, 1], and what a domain does to them."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

PRETRAIN, FINETUNE, VALIDATE = 900, 320, 80  # of 1,797 scans; the rest is for testing
TASK = (1, 4, 6, 8, 9)


def noise(x: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=g)


def brightness(x: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.5


def defocus(x: Tensor, g: torch.Generator) -> Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def fog(x: Tensor, g: torch.Generator) -> Tensor:
    coarse = torch.rand(x.shape[0], 1, 3, 3, generator=g)
    return 0.5 * x + 0.5 * F.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=True)


def warp(x: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)


def rotation(x: Tensor, g: torch.Generator) -> Tensor:
    angle = (torch.rand(len(x), generator=g) * 2 - 1) * math.radians(40)
    return warp(x, angle, torch.zeros(len(x), 2))


def inversion(x: Tensor, g: torch.Generator) -> Tensor:
    return 1 - x


def translation(x: Tensor, g: torch.Generator) -> Tensor:
    return warp(x, torch.zeros(len(x)), torch.randint(-1, 2, (len(x), 2), generator=g) * 0.25)


Domain = Callable[[Tensor, torch.Generator], Tensor]
SHIFTED: dict[str, Domain] = {
    f.__name__: f for f in (noise, brightness, defocus, fog, rotation, inversion, translation)
}
DOMAINS: dict[str, Domain] = {"clean": lambda x, g: x, **SHIFTED}


def load(seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    sizes = (PRETRAIN, FINETUNE, VALIDATE, len(images) - PRETRAIN - FINETUNE - VALIDATE)
    parts = zip(("pretrain", "finetune", "validate", "test"), order.split(sizes), strict=True)
    return images, torch.from_numpy(digits.target), dict(parts)
