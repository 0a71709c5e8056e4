"""PEFT: LoRA's matrices are held near zero, which needs no anchors; the base model is frozen.

python -m examples.clients.peft_lora
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import robustft_kernels as rft

from . import Outcome

CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def main(method: str = "spd", strength: float = 1.0, *, seed: int = 0, steps: int = 40) -> Outcome:
    """LoRA on a small Llama, random in place of pre-trained, that learns to repeat one sequence."""
    torch.manual_seed(seed)
    model = get_peft_model(LlamaForCausalLM(CONFIG), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    tokens = torch.arange(1, 25).remainder(7)[None]

    optimizer = rft.for_model("AdamSPD", lr=1e-2, method=method, strength=strength, anchor="zero")(model)
    zero = {name: torch.zeros_like(param) for name, param in model.named_parameters() if param.requires_grad}
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Outcome(losses[0], losses[-1], zero, model, optimizer, next(iter(zero)))


if __name__ == "__main__":
    outcome = main()
    print(outcome)
    merged = outcome.model.merge_and_unload()
    print("merged into a", type(merged).__name__)
