"""timm: our optimizer under a name of timm's own factory, with its layer-wise decay and its scheduler.

python -m examples.clients.timm_vit
"""

from typing import Any

import torch
from timm import create_model
from timm.optim import OptimInfo, create_optimizer_v2, param_groups_layer_decay
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn.functional import cross_entropy

import robustft_kernels as rft

from . import Outcome, loss_of, snapshot

STEPS = 20

# Without "_" in the name, of which timm would take what follows.
default_registry.register(OptimInfo("adamspd", rft.AdamSPD, "AdamW with selective projection decay", has_betas=True))


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    """timm's groups: rates that fall with the depth, no weight decay on vectors; here also names, and a free head."""
    names = {param: name for name, param in model.named_parameters()}
    made: list[dict[str, Any]] = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
    for group in made:
        group["params"] = [(names[param], param) for param in group["params"]]
        if group["params"][0][0].startswith("head."):  # timm's last layer is the head alone
            group["method"] = "none"
    return made


def main(method: str = "spd", strength: float = 1.0, *, seed: int = 0) -> Outcome:
    """A small ViT, random in place of pre-trained, on random images of 5 classes."""
    torch.manual_seed(seed)
    model = create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    start = snapshot(model, without="head")
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 5

    optimizer = create_optimizer_v2(model, "adamspd", lr=1e-3, param_group_fn=decayed, method=method, strength=strength)
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
