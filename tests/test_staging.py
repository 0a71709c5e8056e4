"""What the host sends to a device: from pinned memory, without a wait. A GPU is feigned by torch's tensors without
numbers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import robustft_kernels as rft
from robustft_kernels.core import staging
from robustft_kernels.core.exchange import Segments
from robustft_kernels.core.methods import RULES
from robustft_kernels.core.staging import staged
from robustft_kernels.testing import CASES, SETTINGS, Stepper

GPU = torch.device("cuda", 0)


class Sends(TorchDispatchMode):
    """Notes the copies from the host to a device: which are asynchronous, and from pinned memory."""

    def __init__(self):
        super().__init__()
        self.seen, self._pinned = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self._pinned.add(id(out))
        if func is torch.ops.aten._to_copy.default and (args[0].device.type, out.device.type) == ("cpu", "cuda"):
            self.seen.append(bool(kwargs.get("non_blocking")) and id(args[0]) in self._pinned)
        return out


def test_numbers_of_the_host_go_through_pinned_memory():
    with FakeTensorMode(), Sends() as sends:
        assert staged(torch.arange(4), GPU).device == GPU
        torch.arange(4).to(GPU, non_blocking=True)  # from memory that is not pinned
    assert sends.seen == [True, False]
    here = torch.arange(4)
    assert staged(here, torch.device("cpu")) is here


def test_tables_of_shards_do():
    with FakeTensorMode(), Sends() as sends:
        params = [torch.empty(3, 2, device=GPU), torch.empty(4, device=GPU)]
        Segments(params, [RULES["observe_rows"]] * 2)
    assert sends.seen == [True]


@pytest.mark.skipif(bool(rft.backends()["triton"]), reason=rft.backends()["triton"] or "ready")
def test_tables_of_the_triton_backend_do(device, monkeypatch):
    """All that a table has from the host goes by `staged`."""
    from robustft_kernels.triton_kernels import launch, table

    sent = []

    def note(tensor, device):
        sent.append(tensor)
        return staged(tensor, device)

    monkeypatch.setattr(table, "staged", note)
    monkeypatch.setattr(launch, "staged", note)
    monkeypatch.setattr(launch, "started_by", lambda *_: lambda *_: None)
    stepper = Stepper(CASES[:4], SETTINGS[0], "spd", torch.float32, device=device)
    for form, more in (("triton", 0), ("triton_tickets", 1)):
        sent.clear()
        stepper.run(form, stepper.grads())
        assert len(sent) == 2 + more, form
        rows, owners = sent[:2]
        assert (rows.dtype, len(rows)) == (torch.int64, 4)
        assert owners.dtype == torch.int32


def test_a_graph_captures_no_copy_from_the_host(monkeypatch):
    """It would read that memory again at each replay."""
    monkeypatch.setattr(staging, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="make the same call once before the capture"):
        staged(torch.ones(2), GPU)
