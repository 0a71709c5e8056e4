"""TRL: SFTTrainer is given what makes the optimizer. With LoRA it adds the adapters first, and they are held near zero.

python -m examples.clients.trl_sft
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

import robustft_kernels as rft

from . import Outcome

STEPS = 30
CONFIG = LlamaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def main(
    folder: str | Path, method: str = "spd", strength: float = 1.0, *, lora: bool = False, seed: int = 0
) -> Outcome:
    """A small Llama, random in place of pre-trained, learns to count; whole, or by LoRA."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(CONFIG)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    tokens = (torch.arange(32)[:, None] + torch.arange(12)) % 29 + 3

    options: dict[str, Any] = {"anchor": "zero"} if lora else {}
    make = rft.for_model("AdamSPD", lr=1e-2, method=method, strength=strength, **options)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(folder), max_steps=STEPS, per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True, seed=seed,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) if lora else None,
        optimizer_cls_and_kwargs=(make, {}),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if lora:
        start = {name: torch.zeros_like(param) for name, param in trainable(trainer.model)}
    before = loss_on(trainer.model, tokens)
    trainer.train()
    layer = next(name for name, _ in trainable(trainer.model) if "q_proj" in name)
    return Outcome(before, loss_on(trainer.model, tokens), start, trainer.model, trainer.optimizer, layer)


def tokenizer() -> PreTrainedTokenizerFast:
    """For SFTTrainer, which asks for one. The data are tokens already."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def trainable(model: Any) -> list[tuple[str, Any]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


@torch.no_grad()
def loss_on(model: Any, tokens: torch.Tensor) -> float:
    return float(model.eval()(input_ids=tokens, labels=tokens).loss)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(main(folder))
        print("\nLoRA:", main(folder, lora=True), sep="\n")
