"""Optimizers that evaluate other weights than they step: refused by `Anchored`, and held if they go around our own."""

import inspect

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import robustft_kernels as rft
from tests.test_wrapper import Lion


class ScheduleFree(Optimizer):
    """Defazio et al., "The Road Less Scheduled", 2024, around another optimizer, which steps z.

    The parameters are y = (1 − β)z + βx while it trains, and x, the mean of all z, while it evaluates.
    """

    def __init__(self, base, beta=0.9):
        self.base, self.beta, self.count, self.training = base, beta, 0, True
        self.z = [p.detach().clone() for p in base.param_groups[0]["params"]]
        self.x = [z.clone() for z in self.z]
        super().__init__(base.param_groups, {})

    def show(self, share):
        for p, x, z in zip(self.base.param_groups[0]["params"], self.x, self.z, strict=True):
            p.data.copy_((1 - share) * z + share * x)

    def train(self):
        self.show(self.beta)

    def eval(self):
        self.show(1)

    @torch.no_grad()
    def step(self):
        self.count += 1
        self.show(0)
        self.base.step()
        for p, x, z in zip(self.base.param_groups[0]["params"], self.x, self.z, strict=True):
            z.copy_(p)
            x.lerp_(z, 1 / self.count)
        self.show(self.beta)


class Holding(Lion):
    """Passes nothing on of what it holds."""

    def __init__(self, held, params):
        super().__init__(params)
        self.held = held


class AcceleratedOptimizer(Holding):
    """As Accelerate's, it has a train() and an eval() whatever it holds."""

    def train(self):
        pass

    eval = train


def with_methods(*names):
    return type("Averaging", (Lion,), {name: lambda self: None for name in names})


def weights():
    return [nn.Parameter(torch.zeros(5, 7))]


@pytest.mark.parametrize(
    "make",
    [
        lambda params: ScheduleFree(SGD(params)),
        lambda params: Holding(ScheduleFree(SGD(params)), params),
        lambda params: Holding([SGD(params), Holding(ScheduleFree(SGD(params)), params)], params),
        lambda params: AcceleratedOptimizer(ScheduleFree(SGD(params)), params),
    ],
)
def test_schedule_free_is_refused_by_name(make):
    inner = make(weights())
    before = set(inner.param_groups[0])
    with pytest.raises(ValueError, match=r"ScheduleFree exchanges the weights .* by train\(\) and eval\(\)"):
        rft.Anchored(inner, method="project", radius=0.1)
    assert set(inner.param_groups[0]) == before


@pytest.mark.parametrize("method", ["swap_swa_sgd", "swap_ema_weights", "backup_and_load_cache"])
def test_averages_and_slow_weights_are_refused_by_name(method):
    with pytest.raises(ValueError, match=rf"Averaging exchanges .* by {method}\(\), .*AveragedModel"):
        rft.Anchored(with_methods(method)(weights()))


def test_others_are_taken():
    for cls in vars(torch.optim).values():
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer:
            rft.Anchored(cls(weights(), lr=0.1))
    rft.Anchored(with_methods("train")(weights()))
    params = weights()
    cyclic = Holding(None, params)
    cyclic.held = Holding([cyclic], params)
    rft.Anchored(cyclic)
    rft.Anchored(AcceleratedOptimizer(SGD(params), params))


@pytest.mark.parametrize(
    "make",
    [
        lambda params, **kwargs: rft.AnchoredAdamW(params, **kwargs),
        lambda params, **kwargs: rft.AnchoredSGD(params, **kwargs),
        lambda params, **kwargs: rft.Anchored(SGD(params, kwargs.pop("lr")), **kwargs),
    ],
)
def test_around_ours_the_average_is_within_the_radius(make):
    """Each z is, and a ball is convex."""
    torch.manual_seed(0)
    model = nn.Linear(16, 4)
    start = model.weight.detach().clone()

    def deviation():
        return float((model.weight.detach() - start).norm())

    optimizer = ScheduleFree(make(model.parameters(), lr=0.3, method="project", radius=0.1))
    for _ in range(20):
        model.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    optimizer.eval()
    assert 0.05 < deviation() < 0.1 + 1e-6
    optimizer.show(0)
    assert deviation() == pytest.approx(0.1)
