"""timm: our optimizer by its name in timm's own factory, with timm's layer-wise decay and its scheduler.

python -m examples.clients.timm_vit
"""

import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import cross_entropy

import robustft_kernels.timm  # noqa: F401 - timm then knows our names

from . import Outcome, loss_of, snapshot

STEPS = 20


def main(method: str = "spd", strength: float = 1.0, *, seed: int = 0) -> Outcome:
    """A small ViT, random in place of pre-trained, on random images of 5 classes."""
    torch.manual_seed(seed)
    model = create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    start = snapshot(model, without="head")
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 5

    optimizer = create_optimizer_v2(
        model, "adamspd", lr=1e-3, weight_decay=0.05, layer_decay=0.75, method=method, strength=strength,
        model=model, head="head",  # once more, for names and a free head: timm makes its groups without names
    )  # fmt: skip
    schedule = CosineLRScheduler(
        optimizer, t_initial=STEPS, warmup_t=3, warmup_lr_init=1e-5, lr_min=1e-5, t_in_epochs=False
    )
    before = loss_of(model, images, labels)
    for step in range(STEPS):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step_update(step + 1)
    return Outcome(before, loss_of(model, images, labels), start, model, optimizer, "blocks.0.attn.qkv.weight")


if __name__ == "__main__":
    print(main())
