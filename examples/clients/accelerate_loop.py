"""Accelerate: `prepare` takes our optimizer as any other; accumulation, clipping, mixed precision, saved states.

python -m examples.clients.accelerate_loop
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import robustft_kernels as rft

from . import Net, Outcome, examples, loss_of, snapshot

EPOCHS = 12


def main(
    folder: str | Path,
    method: str = "spd",
    strength: float = 1.0,
    *,
    precision: str = "no",
    seed: int = 0,
    resume: str | Path | None = None,
) -> Outcome:
    """Twelve epochs, each of them saved in `folder` as "epoch-1" ...; goes on from `resume`, one of these."""
    torch.manual_seed(seed)
    model = Net()
    start = snapshot(model, without="head")
    inputs, labels = examples()
    before = loss_of(model, inputs, labels)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    optimizer = rft.for_model("AdamSPD", head="head", lr=1e-2, method=method, strength=strength)(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * 4)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=12)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    first = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        first = int(Path(resume).name.removeprefix("epoch-"))
    for epoch in range(first, EPOCHS):
        for batch, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(batch), targets))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        accelerator.save_state(str(Path(folder) / f"epoch-{epoch + 1}"))
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return Outcome(before, loss_of(plain, inputs, labels), start, plain, optimizer, "backbone.0.weight")


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(main(folder))
