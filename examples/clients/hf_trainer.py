"""Hugging Face Trainer: the optimizer is given as an object, or Trainer makes it.

python -m examples.clients.hf_trainer
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import robustft_kernels as rft

from . import Outcome, snapshot

STEPS = 30


def main(
    folder: str | Path,
    method: str = "spd",
    strength: float = 1.0,
    *,
    by_trainer: bool = False,
    seed: int = 0,
    resume: str | Path | None = None,
    save_only_model: bool = False,
    **more: Any,
) -> Outcome:
    """Fine-tunes a small BERT, random in place of pre-trained, with clipping, accumulation and checkpoints in `folder`.

    by_trainer: whether Trainer makes the optimizer; else it is made here.
    resume: a checkpoint to go on from. more: further options of the optimizer.
    """
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    model = BertForSequenceClassification(config)
    start = snapshot(model, without="classifier")
    tokens = torch.randint(1, 64, (128, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": (row < 8).any().long()} for row in tokens]

    # With names, and the head free.
    make = rft.for_model("AdamSPD", head="classifier", lr=3e-3, method=method, strength=strength, **more)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=8, gradient_accumulation_steps=2,
            max_grad_norm=1.0, warmup_steps=3, save_steps=STEPS // 2, use_cpu=True, report_to="none",
            logging_strategy="no", disable_tqdm=True, save_only_model=save_only_model,
        ),
        train_dataset=data,
        # A scheduler of None is made by Trainer, and leads the learning rate. Of the keywords, Trainer takes the model
        # and gives it to what makes the optimizer.
        optimizers=(None if by_trainer else make(model), None),
        optimizer_cls_and_kwargs=(make, {"model": model}) if by_trainer else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate(data)["eval_loss"]
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    after = trainer.evaluate(data)["eval_loss"]
    query = "bert.encoder.layer.0.attention.self.query.weight"
    return Outcome(before, after, start, model, trainer.optimizer, query)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(main(folder))
        print("\nmade by Trainer:", main(folder, by_trainer=True), sep="\n")
