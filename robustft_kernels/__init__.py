"""Fused multi-tensor kernels for robust fine-tuning, as PyTorch optimizers."""

from ._import_paths import install
from .backends import built as _built
from .backends.registry import backends
from .core.methods import METHODS
from .finetune.by_radius import by_radius, suggest_radii
from .finetune.param_groups import bitfit, keep_requires_grad, layerwise_decay, linear_probe, partial_fusion
from .finetune.projection import deviation, interpolate_, project, project_
from .finetune.soups import model_stock, soup, stock_ratios
from .finetune.tpgm import TPGM
from .finetune.wise import wise_ft, wise_ft_, wise_sweep
from .optim.for_model import for_model
from .optim.in_backward import StepInBackward
from .optim.named import SGDFTP, SGDL2SP, SGDPGM, SGDSPD, AdamFTP, AdamL2SP, AdamPGM, AdamSPD
from .optim.optimizers import AnchoredAdamW, AnchoredSGD
from .optim.schedules import RecAdamScheduler, StrengthScheduler
from .optim.wrapper import Anchored
from .step import ops as _ops  # noqa: F401 - defines torch.ops.robustft

install()
_built.warn_if_unusable()

__version__ = "0.3.0"
__all__ = [
    "METHODS", "SGDFTP", "SGDL2SP", "SGDPGM", "SGDSPD", "TPGM", "AdamFTP", "AdamL2SP", "AdamPGM", "AdamSPD",
    "Anchored", "AnchoredAdamW", "AnchoredSGD", "RecAdamScheduler", "StepInBackward", "StrengthScheduler", "backends",
    "bitfit", "by_radius", "deviation", "for_model", "interpolate_", "keep_requires_grad", "layerwise_decay",
    "linear_probe", "model_stock", "partial_fusion", "project", "project_", "soup", "stock_ratios", "suggest_radii",
    "wise_ft", "wise_ft_", "wise_sweep",
]  # fmt: skip
