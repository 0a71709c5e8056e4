"""Real clients: our optimizers inside the training stacks that people use, one short file each."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import robustft_kernels as rft


@dataclass(frozen=True, repr=False)
class Outcome:
    """What the `main` of a client returns, and prints.

    before, after: the loss on the training data. start: what the weights were to be held near; model and optimizer: as
    they are at last. layer: the parameter whose telemetry is printed.
    """

    before: float
    after: float
    start: dict[str, Tensor]
    model: Any
    optimizer: Any
    layer: str

    @property
    def deviation(self) -> float:
        """‖θ − θ₀‖ over all that was to be held."""
        held = {name: param for name, param in self.model.named_parameters() if name in self.start}
        return math.hypot(*rft.deviation(held.values(), [self.start[name] for name in held]))

    def __str__(self) -> str:
        told = getattr(self.optimizer, "optimizer", self.optimizer).telemetry()  # Accelerate wraps it
        return "\n".join([
            f"loss {self.before:.3f} → {self.after:.3f}",
            f"deviation {self.deviation:.3f}",
            f"{self.layer}: {told[self.layer]}",
        ])  # fmt: skip


def snapshot(model: nn.Module, *, without: str) -> dict[str, Tensor]:
    """Copies of all parameters but those whose names begin with `without`, the fresh head's."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith(without)}


class Net(nn.Module):
    """A backbone and a head, in place of a pre-trained model and what is new."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(inputs))
        return logits


def examples(count: int = 96) -> tuple[Tensor, Tensor]:
    """Inputs (count, 16) and classes (count,): a linear teacher's, every third one at random."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 16, generator=g)
    labels = (inputs @ torch.randn(16, 3, generator=g)).argmax(1)
    labels[::3] = torch.randint(3, labels[::3].shape, generator=g)
    return inputs, labels


@torch.no_grad()
def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Cross-entropy in evaluation mode."""
    mode = model.training
    loss = nn.functional.cross_entropy(model.eval()(inputs).float(), labels)
    model.train(mode)
    return float(loss)
