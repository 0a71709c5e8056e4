"""Fused multi-tensor kernels for robust fine-tuning, as PyTorch optimizers."""

from .methods import METHODS
from .ops import backends
from .optimizers import SGDSPD, AdamL2SP, AdamSPD, AnchoredAdamW, AnchoredSGD

__version__ = "0.2.0"
__all__ = ["METHODS", "SGDSPD", "AdamL2SP", "AdamSPD", "AnchoredAdamW", "AnchoredSGD", "backends"]
