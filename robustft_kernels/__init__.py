"""Fused multi-tensor kernels for robust fine-tuning, as PyTorch optimizers."""

from .in_backward import StepInBackward
from .methods import METHODS
from .named import SGDFTP, SGDL2SP, SGDPGM, SGDSPD, AdamFTP, AdamL2SP, AdamPGM, AdamSPD
from .ops import backends
from .optimizers import AnchoredAdamW, AnchoredSGD
from .param_groups import bitfit, keep_requires_grad, layerwise_decay, linear_probe, partial_fusion
from .projection import deviation, interpolate_, project, project_
from .tpgm import TPGM
from .wise import wise_ft, wise_ft_, wise_sweep
from .wrapper import Anchored

__version__ = "0.3.0"
__all__ = [
    "METHODS", "SGDFTP", "SGDL2SP", "SGDPGM", "SGDSPD", "TPGM", "AdamFTP", "AdamL2SP", "AdamPGM", "AdamSPD",
    "Anchored", "AnchoredAdamW", "AnchoredSGD", "StepInBackward", "backends", "bitfit", "deviation", "interpolate_",
    "keep_requires_grad", "layerwise_decay", "linear_probe", "partial_fusion", "project", "project_", "wise_ft",
    "wise_ft_", "wise_sweep",
]  # fmt: skip
