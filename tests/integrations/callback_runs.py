"""Short trainings with the real trainers, with callbacks or without, for test_callbacks.py."""

import copy
import csv
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import robustft_kernels as rft
from examples.clients import Net, examples

transformers = pytest.importorskip("transformers", exc_type=ImportError)
lightning = pytest.importorskip("lightning", exc_type=ImportError)
from robustft_kernels.callbacks import huggingface as hf  # noqa: E402
from robustft_kernels.callbacks import lightning as lit  # noqa: E402

TRAINERS = ("huggingface", "lightning")
STEPS, BATCH = 12, 8
TPGM = {"lr": 0.02, "exclude": ["head"], "steps": 2}


class Examples(Dataset):
    """Those of the clients, as dictionaries. `shift` makes other labels."""

    def __init__(self, count=96, shift=0):
        self.inputs, labels = examples(count)
        self.labels = (labels + shift) % 3

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        return {"inputs": self.inputs[k], "labels": self.labels[k]}


class WithLoss(Net):
    """A model as Hugging Face's: it takes the labels, and returns its loss."""

    def forward(self, inputs, labels):
        logits = super().forward(inputs)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Module(WithLoss, lightning.LightningModule):
    """The same as a LightningModule. No dropout: a resumed Trainer does not bring the random generator back."""

    def __init__(self, make):
        super().__init__(dropout=0.0)
        self.make = make

    def training_step(self, batch, batch_idx):
        loss = self(**batch)["loss"]
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("eval_loss", self(**batch)["loss"])

    def configure_optimizers(self):
        return self.make(self)


@dataclass
class Run:
    """A training at its end. start: the weights before it; logged: what its logger was given, in order."""

    net: nn.Module
    start: dict[str, torch.Tensor]
    trainer: Any
    callbacks: list[Any]
    logged: list[dict[str, float]]

    def of(self, name):
        return next(callback for callback in self.callbacks if type(callback).__name__ == name)

    @property
    def tpgm(self):
        return self.of("TPGMCallback").learner.tpgm

    @property
    def optimizer(self):
        found = self.trainer.optimizer if hasattr(self.trainer, "optimizer") else self.trainer.optimizers[0]
        return getattr(found, "optimizer", found)

    def bits(self):
        return {name: of.numpy().tobytes() for name, of in self.net.state_dict().items()}


def spd(net):
    return rft.for_model("AdamSPD", head="head", lr=1e-2, strength=1.0)(net)


def train(kind, folder, *makers, data=None, evaluation=None, every=None, make=spd, seed=0, resume=None, **options):
    """Twelve steps of two batches each, a checkpoint at the sixth. `makers`: from the module of callbacks, and what
    takes a trainer, to a callback. every: the steps between two evaluations."""
    torch.manual_seed(seed)
    data = Examples() if data is None else data
    run = train_hf if kind == "huggingface" else train_lit
    return run(folder, makers, data, evaluation or Examples(24), every, make, resume, options)


def train_hf(folder, makers, data, evaluation, every, make, resume, options):
    net = WithLoss(options.pop("dropout", 0.1))
    start = copy.deepcopy(net.state_dict())
    arguments = transformers.TrainingArguments(
        str(folder), **{
            "max_steps": STEPS, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 2, "save_steps": 6,
            "use_cpu": True, "report_to": "none", "logging_steps": 2, "disable_tqdm": True,
            "eval_strategy": "steps" if every else "no", "eval_steps": every, **options,
        }
    )  # fmt: skip
    trainer = transformers.Trainer(
        net, arguments, train_dataset=data, eval_dataset=evaluation, optimizers=(make(net), None)
    )
    trainer.remove_callback(transformers.PrinterCallback)
    callbacks = [maker(hf, (trainer,)) for maker in makers]
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    return Run(net, start, trainer, callbacks, trainer.state.log_history)


def train_lit(folder, makers, data, evaluation, every, make, resume, options):
    module = Module(make)
    options.pop("dropout", None)
    start = copy.deepcopy(module.state_dict())
    callbacks = [maker(lit, ()) for maker in makers]
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, accumulate_grad_batches=2, log_every_n_steps=2,
        logger=lightning.pytorch.loggers.CSVLogger(folder),
        callbacks=[*callbacks, saving], enable_progress_bar=False, enable_model_summary=False,
        val_check_interval=2 * every if every else None, check_val_every_n_epoch=None if every else 1,
        limit_val_batches=None if every else 0, **options,
    )  # fmt: skip
    loaders = DataLoader(data, BATCH), DataLoader(evaluation, BATCH)
    trainer.fit(module, *loaders, ckpt_path=None if resume is None else folder / f"step={resume}.ckpt")
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        rows = [{key: float(of) for key, of in row.items() if of} for row in csv.DictReader(file)]
    return Run(module, start, trainer, callbacks, rows)


def tpgm(held_out, every="evaluation", **options):
    return lambda of, first: of.TPGMCallback(*first, held_out, every=every, **{**TPGM, **options})


def telemetry(**options):
    return lambda of, first: of.TelemetryCallback(*first, **options)


def wise(alpha, pretrained=None, **options):
    return lambda of, first: of.WiSECallback(*first, alpha, pretrained, **options)


def watched(maker, calls):
    """The same callback. Each time it learns, `calls` gets the step, the weights before, and those after."""

    def make(of, first):
        callback = maker(of, first)
        learner, learn = callback.learner, callback.learner.learn

        def weights():
            return {name: param.detach().clone() for name, param in learner._params.items()}

        def noted(step, loss_fn):
            before = weights()
            learn(step, loss_fn)
            calls.append((step, before, weights()))

        learner.learn = noted
        return callback

    return make
