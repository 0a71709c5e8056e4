"""The methods under comparison, one row each; the head is free in all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import robustft_kernels as rft

from .model import Classifier

HEAD_LR = 1e-2


@dataclass(frozen=True)
class Method:
    """options: of AnchoredAdamW. knob, strengths: its one hyper-parameter, and the grid of it.

    trains: "all", "head", or "lora". wise: the name of WiSE-FT on top of it, "" for none.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    knob: str = "strength"
    strengths: tuple[float, ...] = (0.0,)
    trains: str = "all"
    wise: str = ""


ALPHAS = (0.5, 0.75)  # of WiSE-FT: 0 is the pre-trained encoder, 1 the fine-tuned one
LORA: dict[str, Any] = {"anchor": "zero"}
METHODS = {
    "LP": Method(trains="head"),
    "AdamW": Method(wise="WiSE-FT"),
    "L2-SP": Method({"method": "l2sp"}, strengths=(30.0, 300.0)),
    "PGM": Method({"method": "project"}, knob="radius", strengths=(0.1, 0.3)),
    "FTP": Method({"method": "ftp"}, knob="k", strengths=(1.0,)),
    "SPD": Method({"method": "spd"}, strengths=(0.5, 1.0, 2.0), wise="WISE-SPD"),
    "LoRA, AdamW": Method(LORA, trains="lora"),
    "LoRA, SPD": Method({"method": "spd", **LORA}, strengths=(0.5, 2.0), trains="lora"),
}


def adapted(model: Classifier, trains: str) -> list[tuple[str, nn.Parameter]]:
    """The named parameters of the encoder that train, all others frozen. LoRA: rank 8 on queries and values."""
    if trains == "lora":
        from peft import LoraConfig, get_peft_model

        model.encoder = get_peft_model(
            model.encoder, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
        ).eval()
    model.encoder.requires_grad_(trains == "all")
    named = [
        (f"encoder.{name}", param)
        for name, param in model.encoder.named_parameters()
        if trains == "all" or (trains == "lora" and "lora_" in name)
    ]
    for _, param in named:
        param.requires_grad_(True)
    return named


def optimizer_of(model: Classifier, method: Method, lr: float, strength: float) -> rft.AnchoredAdamW:
    """The head first, at a rate of its own and free; then what trains of the encoder."""
    head = [(f"head.{name}", param) for name, param in model.head.named_parameters()]
    groups: list[dict[str, Any]] = [{"params": head, "lr": HEAD_LR, "method": "none"}]
    if named := adapted(model, method.trains):
        groups.append({"params": named, "lr": lr, method.knob: strength, **method.options})
    return rft.AnchoredAdamW(groups)
