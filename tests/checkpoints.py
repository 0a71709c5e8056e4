"""What the checkpoints of a version are, and which weights follow from them.

    python -m tests.checkpoints FILE    with that version installed: writes what test_checkpoints.py reads

It uses public names alone, so that any version can run it.
"""

import copy
import sys

import torch
from torch import nn

import robustft_kernels as rft

STEPS = 3


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(t):
    return torch.randn(16, 7, generator=torch.Generator().manual_seed(t))


def loss_of(model, t):
    dtype = next(model.parameters()).dtype
    return (model(batch(t).to(dtype)) - 2).float().square().mean()


def train(model, optimizer, start):
    for t in range(start, start + STEPS):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()


class Tuned:
    """An optimizer with TPGM after each of its steps, as one thing to save."""

    def __init__(self, model):
        self.model, self.inner = model, torch.optim.SGD(model.parameters(), lr=0.1)
        self.tpgm, self.batches = rft.TPGM(model, lr=0.05, norm="mars"), [100, 101]

    def zero_grad(self):
        self.inner.zero_grad()

    def step(self):
        self.inner.step()
        self.tpgm.step(lambda t: loss_of(self.model, t), self.batches)

    def state_dict(self):
        return self.tpgm.state_dict()

    def load_state_dict(self, saved):
        self.tpgm.load_state_dict(saved)


# By name: the dtype of the weights, and a function from a model to its optimizer.
CASES = {
    "spd, amsgrad": (torch.float32, lambda m: rft.AdamSPD(m.named_parameters(), lr=0.05, strength=1.5, amsgrad=True)),
    "ftp, sgd": (torch.float32, lambda m: rft.SGDFTP(m.parameters(), lr=0.05, momentum=0.9, radius_lr=0.1)),
    "pgm, master, bf16 moments": (
        torch.bfloat16,
        lambda m: rft.AdamPGM(
            m.parameters(), lr=0.05, radius=0.3, master_weights=True, state_dtype=torch.bfloat16, seed=7
        ),
    ),
    "l2sp, stochastic": (torch.bfloat16, lambda m: rft.SGDL2SP(m.parameters(), lr=0.1, stochastic_rounding=True)),
    "around adamw": (torch.float32, lambda m: rft.Anchored(torch.optim.AdamW(m.parameters(), lr=0.05), strength=1.5)),
    "tpgm": (torch.float32, Tuned),
}


def made(name):
    """What is saved after some steps, the weights at that time, and the weights after as many more steps."""
    dtype, make = CASES[name]
    model = model_of(dtype)
    optimizer = make(model)
    train(model, optimizer, 0)
    saved = copy.deepcopy({"state": optimizer.state_dict(), "weights": model.state_dict()})
    train(model, optimizer, STEPS)
    return {**saved, "after": model.state_dict()}


def continued(name, saved):
    """The weights that follow from what `made` returned."""
    dtype, make = CASES[name]
    model = model_of(dtype)
    optimizer = make(model)
    model.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["state"])
    train(model, optimizer, STEPS)
    return model.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save({name: made(name) for name in CASES}, sys.argv[1])
