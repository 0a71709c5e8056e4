"""The net, how accurate it is in each domain, and its pre-training under all of them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import robustft_kernels as rft

from .data import DOMAINS

LAYERS = ("0.0.weight", "1.0.weight", "3.0.weight", "6.weight")  # of Net.features: all but norms and biases


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU())


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(1, 32), conv(32, 32), nn.MaxPool2d(2), conv(32, 64), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(256, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent correct in each domain; a domain's randomness is the same for every model."""
    model.eval()
    out = {}
    for name, domain in DOMAINS.items():
        x = domain(images, torch.Generator().manual_seed(7))
        out[name] = 100 * float((model(x).argmax(1) == labels).float().mean())
    model.train()
    return out


def pretrain(images: Tensor, labels: Tensor, steps: int, cache: Path, seed: int) -> Net:
    file = cache / f"digits-{steps}-{seed}.pt"
    torch.manual_seed(seed)
    model = Net(10)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    optimizer = rft.AnchoredAdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = torch.Generator().manual_seed(seed)
    domains = list(DOMAINS.values())
    for t in tqdm(range(steps), desc=f"pre-train, seed {seed}", unit="step", mininterval=0.5):
        pick = torch.randint(len(images), (128,), generator=g)
        x = domains[t % len(domains)](images[pick], g)
        loss = F.cross_entropy(model(x), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model
