"""Lightning: `configure_optimizers` returns our optimizer, which clips, and a scheduler; the Trainer saves and resumes.

python -m examples.clients.lightning_module
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import robustft_kernels as rft

from . import Net, Outcome, examples, loss_of, snapshot

EPOCHS = 12


class FineTuned(lightning.LightningModule):
    def __init__(self, method: str, strength: float) -> None:
        super().__init__()
        self.net = Net(dropout=0.0)  # its masks would part: a resumed Trainer does not bring the random generator back
        # Clipping inside the step: in mixed precision Lightning's gradient_clip_val refuses what unscales gradients in
        # its step, as our optimizers and torch's fused ones do.
        self.options: dict[str, Any] = {"lr": 1e-2, "method": method, "strength": strength, "max_grad_norm": 1.0}

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> dict[str, Any]:
        # Called when `fit` begins: anchors are the weights of then. Where a checkpoint is resumed they are replaced by
        # those that it carries.
        optimizer = rft.for_model("AdamSPD", head="net.head", **self.options)(self)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def main(
    folder: str | Path,
    method: str = "spd",
    strength: float = 1.0,
    *,
    precision: str = "32-true",
    seed: int = 0,
    resume: str | Path | None = None,
) -> Outcome:
    """Twelve epochs, clipped, each saved in `folder` as "epoch=0.ckpt" ...; goes on from `resume`, one of these."""
    lightning.seed_everything(seed, verbose=False)
    module = FineTuned(method, strength)
    start = snapshot(module, without="net.head")
    inputs, labels = examples()
    before = loss_of(module.net, inputs, labels)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=EPOCHS, precision=precision, logger=False,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=24)
    trainer.fit(module, loader, ckpt_path=None if resume is None else str(resume))
    return Outcome(
        before, loss_of(module.net, inputs, labels), start, module, trainer.optimizers[0], "net.backbone.0.weight"
    )


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(main(folder))
