"""Our optimizers inside other libraries. Nothing is downloaded; a library that is missing skips its tests."""

import importlib.util
import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of what Lightning calls

# Warnings of the libraries with each other. Ours would still be errors.
OF_LIBRARIES = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),  # Lightning
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),  # Lightning
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning"),  # it sees pytest's arguments
]


def declare_missing_ops() -> None:
    """torchvision's wheels for CUDA cannot load their compiled ops beside a CPU build of torch, and then not even be
    imported, nor can what imports them: timm, transformers, torchmetrics. None of these calls the two ops here."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if importlib.util.find_spec("torchvision"):
    declare_missing_ops()
