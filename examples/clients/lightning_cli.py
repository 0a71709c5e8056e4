"""Lightning CLI: a configuration file names `for_model` and gives it literals; names and a free head come with it.

python -m examples.clients.lightning_cli
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from . import Net, Outcome, examples, loss_of, snapshot

CONFIG = """
seed_everything: SEED
model:
  optimizer:
    class_path: robustft_kernels.for_model
    init_args: {optimizer: AdamSPD, head: net.head}
    dict_kwargs: {lr: 1.0e-2, betas: [0.9, 0.99], method: METHOD, strength: STRENGTH}
trainer:
  accelerator: cpu
  max_epochs: 12
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""


class FineTuned(lightning.LightningModule):
    def __init__(self, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net = Net(dropout=0.0)
        self.optimizer = optimizer
        self.start = snapshot(self, without="net.head")
        self.before = loss_of(self.net, *examples())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.net(inputs), labels)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*examples()), batch_size=24)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self)


def main(folder: str | Path, method: str = "spd", strength: float = 1.0, *, seed: int = 0) -> Outcome:
    """What `python train.py fit --config config.yaml` does, with this CONFIG."""
    file = Path(folder) / "config.yaml"
    file.write_text(
        CONFIG.replace("SEED", str(seed)).replace("METHOD", method).replace("STRENGTH", str(strength)), encoding="utf-8"
    )
    cli = LightningCLI(FineTuned, args=["fit", "--config", str(file)], save_config_callback=None)
    module = cli.model
    after = loss_of(module.net, *examples())
    return Outcome(module.before, after, module.start, module, cli.trainer.optimizers[0], "net.backbone.0.weight")


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(main(folder))
