"""torch.compile of the model, of the step, and of the whole training step. The step is called, not traced."""

import pytest
import torch
from torch import nn

import robustft_kernels as rft

torch._dynamo.config.cache_size_limit = 64

MAKE = {
    "adamw": lambda params, lr: rft.AdamSPD(params, lr=lr),
    "sgd": lambda params, lr: rft.SGDFTP(params, lr=lr, momentum=0.9),
    "wrapped": lambda params, lr: rft.Anchored(torch.optim.Adafactor(params, lr=lr)),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def train(make, lr, compiled):
    """Makes eight steps under a schedule. compiled: "model", "step", "all" or nothing. Returns the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = make(list(model.parameters()), lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=5)
    forward = torch.compile(model, backend="aot_eager") if compiled == "model" else model
    step = torch.compile(optimizer.step, backend="eager") if compiled == "step" else optimizer.step
    x, seen = torch.randn(8, 16), []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))

    def iterate(x):
        loss = forward(x).square().mean()
        loss.backward()
        step()

    if compiled == "all":
        iterate = torch.compile(iterate, backend="eager")
    for _ in range(8):
        optimizer.zero_grad()
        iterate(x)
        scheduler.step()
    assert len(seen) == 8
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("compiled", ["model", "step", "all"])
def test_compiled_equals_eager(make, lr, compiled):
    """Equal bit for bit. Nothing is compiled again as lr changes, and no graph has the inside of the step."""

    def fresh():
        return lr.clone() if isinstance(lr, torch.Tensor) else lr

    want = train(MAKE[make], fresh(), None)
    assert all(map(torch.equal, train(MAKE[make], fresh(), compiled), want))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == {"model": 1, "step": 0, "all": 1}[compiled]


def test_the_step_is_one_graph_break():
    """And fullgraph=True names it."""
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = rft.AdamSPD([param])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="it is a fused kernel already"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert "step" not in optimizer.state[param]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(optimizer.step, backend="eager")()
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) <= 1
    assert optimizer.state[param]["step"] == 1
