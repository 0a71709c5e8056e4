"""How tensors of the host come to a device: through pinned memory, so that the host does not wait."""

import torch
from torch import Tensor


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. The host does not wait for it. If that is the CPU, the tensor itself.

    Differentiable. The pinned memory needs no care: torch gives it to nobody before an asynchronous copy from it is
    done. Raises RuntimeError while a CUDA graph is captured, since each replay would copy from that memory again.
    """
    if device.type != "cuda":
        return tensor.to(device)
    if capturing():
        raise RuntimeError(
            "robustft: numbers of the host are needed on the device, and cannot be sent there while a CUDA graph is "
            "captured; make the same call once before the capture, and keep radii and alphas in tensors on the device"
        )
    pinned = torch.empty_like(tensor, pin_memory=True, requires_grad=False)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
