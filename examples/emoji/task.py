"""The fine-tuning task: tell the kind of an emoji (52 classes), learned in one drawing style, tested in all six."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import data, text
from .model import SCALE, Encoder, pretrained


@dataclass(frozen=True)
class Task:
    """What one seed works with. Images uint8 (n, 3, 64, 64), labels int64; the three sets share no identity.

    classes: (52, 384), the zero-shot classifier: of each kind, the mean text embedding of the names pre-trained on.
    test: style → images; `style` is the one fine-tuned in (in distribution).
    """

    start: Encoder
    classes: Tensor
    style: str
    images: Tensor
    labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    test: dict[str, Tensor]
    test_labels: Tensor

    def loss(self, embedded: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(SCALE * embedded @ self.classes.T, labels)

    def batches(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """The validation set, for methods that learn from it (`task.loss(encoder(images), labels)`)."""
        return list(zip(self.val_images.split(batch), self.val_labels.split(batch), strict=True))


def prepare(seed: int, style: str, cache: Path) -> Task:
    """Split and pre-trained encoder vary with the seed. Makes, and keeps in `cache`, what is not there yet."""
    emoji = data.load(cache)
    texts = embeddings(emoji.names, cache)
    part = data.split(emoji.kinds, seed)
    kinds = emoji.kinds[part.pretrain]
    means = [texts[part.pretrain[kinds == k]].mean(0) for k in range(len(emoji.classes))]
    drawn = emoji.images[data.STYLES.index(style)]
    return Task(
        start=pretrained(emoji, texts, part.pretrain, seed, cache),
        classes=F.normalize(torch.stack(means), dim=1),
        style=style,
        images=drawn[part.finetune],
        labels=emoji.kinds[part.finetune],
        val_images=drawn[part.validate],
        val_labels=emoji.kinds[part.validate],
        test=dict(zip(data.STYLES, emoji.images[:, part.test], strict=True)),
        test_labels=emoji.kinds[part.test],
    )


def embeddings(names: list[str], cache: Path) -> Tensor:
    file = cache / "names.pt"
    if not file.exists():
        torch.save(text.embed(names), file)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def evaluate(encoder: Encoder, task: Task) -> dict[str, float]:
    """Percent correct: "val" (validation, in distribution), "id", "ood" (mean of the other styles), and each style."""

    def accuracy(images: Tensor, labels: Tensor) -> float:
        guesses = torch.cat([(encoder(x) @ task.classes.T).argmax(1) for x in images.split(128)])
        return 100 * float((guesses == labels).float().mean())

    scores = {style: accuracy(images, task.test_labels) for style, images in task.test.items()}
    shifted = [score for style, score in scores.items() if style != task.style]
    val = accuracy(task.val_images, task.val_labels)
    return {"val": val, "id": scores[task.style], "ood": sum(shifted) / len(shifted), **scores}
