"""An update of TPGM leaves no trace but in the radii, whatever goes wrong. Also its batches and its memory."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from robustft_kernels.finetune import evaluation
from robustft_kernels.finetune.tpgm import TPGM
from tests.test_tpgm import fine_tuned, loss_of

F = nn.functional


class Everything:
    """Everything that an update could touch but must not, as bits."""

    def __init__(self, model):
        self.model = model
        for p in itertools.islice(model.parameters(), 3):
            p.grad = torch.randn_like(p)
        model.train()
        model.stem.eval()
        model.stem[1].train()
        self.hooked = []
        model.head.weight.register_hook(lambda grad: self.hooked.append("hook"))
        model.head.weight.register_post_accumulate_grad_hook(lambda param: self.hooked.append("post"))
        self.before = self.state()
        self.tensors = dict(model.named_buffers()), [p.grad for p in model.parameters()]

    def state(self):
        grads = {f"{n}.grad": p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        tensors = {**self.model.state_dict(), **grads, "rng": torch.get_rng_state()}
        return {k: v.detach().clone() for k, v in tensors.items()}, [m.training for m in self.model.modules()]

    def check(self):
        now = self.state()
        assert now[1] == self.before[1]
        assert now[0].keys() == self.before[0].keys()
        for key, value in now[0].items():
            assert torch.equal(value, self.before[0][key]), key
        buffers, grads = self.tensors
        assert all(buffers[name] is b for name, b in self.model.named_buffers())
        assert all(a is p.grad for a, p in zip(grads, self.model.parameters(), strict=True))
        assert self.hooked == []
        self.model.head.weight.sum().backward()
        assert self.hooked == ["hook", "post"]


def careless(model, outcome):
    """A loss that draws numbers, moves buffers and checks the mode. At its third call it goes wrong."""
    calls = itertools.count()

    def loss_fn(batch):
        assert not any(m.training for m in model.modules())
        model.stem[1].train()
        loss = F.cross_entropy(model(batch[0]), batch[1]) + 0 * torch.randn(())
        model.steps = model.steps + 1
        return outcome(loss) if next(calls) == 2 else loss

    return loss_fn


def throw(error):
    raise error


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise OSError("in backward")


FAILURES = [
    (lambda loss: throw(KeyboardInterrupt()), KeyboardInterrupt, None),
    (lambda loss: throw(SystemExit()), SystemExit, None),
    (lambda loss: BadBackward.apply(loss), OSError, "in backward"),
    (lambda loss: float(loss.detach()), TypeError, "loss_fn returned a float"),
    (lambda loss: None, TypeError, "loss_fn returned a NoneType"),
    (lambda loss: loss * torch.ones(2), ValueError, r"the loss has shape \(2,\)"),
    (lambda loss: loss.detach(), ValueError, "the loss depends on none of the parameters"),
    (lambda loss: torch.ones((), requires_grad=True) * 2, ValueError, "the loss depends on none of the parameters"),
    (lambda loss: loss * torch.nan, FloatingPointError, "radius of parameter 'stem.0.weight' is no longer finite"),
]


@pytest.mark.parametrize(("outcome", "error", "message"), FAILURES)
def test_an_update_that_raised_has_changed_nothing(outcome, error, message):
    model, pretrained, batches = fine_tuned(dtype=torch.float32)
    batches, everything = batches * 2, Everything(model)
    tpgm = TPGM(model, anchor=pretrained, norm="mars", init=0.3)
    tpgm.update(loss_of(model), batches, steps=2)
    before = copy.deepcopy(tpgm.state_dict())
    with pytest.raises(error, match=message):
        tpgm.step(careless(model, outcome), batches, steps=3)
    after = tpgm.state_dict()
    assert after["taken"] == before["taken"] == 2
    assert (after["calls"], after["adam"]["state"][0]["step"]) == (0, before["adam"]["state"][0]["step"])
    assert torch.equal(after["radii"], before["radii"])
    assert torch.equal(after["adam"]["state"][0]["exp_avg"], before["adam"]["state"][0]["exp_avg"])
    everything.check()


def test_an_update_that_succeeded_has_changed_the_radii_only():
    model, pretrained, batches = fine_tuned(dtype=torch.bfloat16)
    everything = Everything(model)
    tpgm = TPGM(model, anchor=pretrained, norm="mars_rows")
    tpgm.update(careless(model, lambda loss: loss), batches, steps=5)
    assert any(float(r) > 1e-8 for r in tpgm.radii.values())
    assert float(tpgm.radii["unused"]) == 1e-8
    everything.check()


def test_a_second_interrupt_while_weights_are_put_back(monkeypatch):
    model, pretrained, batches = fine_tuned(dtype=torch.float32)
    everything, put, interrupts = Everything(model), evaluation.put, iter([True, True])

    def interrupted(targets, values):
        if next(interrupts, None):
            put(list(targets)[:2], values[:2])
            raise KeyboardInterrupt
        put(targets, values)

    tpgm = TPGM(model, anchor=pretrained)
    monkeypatch.setattr(evaluation, "put", interrupted)
    next(interrupts)
    with pytest.raises(KeyboardInterrupt):
        tpgm.update(loss_of(model), batches)
    everything.check()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_update_needs_gradients(context):
    model, pretrained, batches = fine_tuned()
    everything = Everything(model)
    with context(), pytest.raises(RuntimeError, match=r"outside torch\.no_grad"):
        TPGM(model, anchor=pretrained).update(loss_of(model), batches)
    everything.check()


def peak_of(function):
    """The most bytes that are alive at once, of those allocated during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:  # or 2.10 warns
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_memory_is_one_copy_and_one_gradient():
    width, depth = 256, 12
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    tpgm = TPGM(model, anchor="initial", init=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    batch, weight = torch.randn(2, width), model[0].weight.detach()
    tpgm.update(lambda x: model(x).square().mean(), [batch])
    one, small = 4 * width**2, 2**16  # bytes of a weight; activations and radii
    args = [weight], tpgm._anchors[:1]
    reducing = peak_of(lambda: tpgm._ball.dots(*args, [weight]))
    pulling = peak_of(lambda: tpgm._ball.pull_(*args, torch.full((1,), 0.5, dtype=torch.float64)))
    peak = peak_of(lambda: tpgm.update(lambda x: model(x).square().mean(), [batch], steps=2))
    assert depth * one <= peak <= (depth + 1) * one + max(reducing, pulling) + small
    copy_and_backward = peak_of(lambda: (copy.deepcopy(model), model(batch).square().mean().backward()))
    assert copy_and_backward >= 2 * depth * one  # to hold all gradients costs this, and the measurement can see it


class Counting:
    """Batches that say how often they were begun."""

    def __init__(self, n):
        self.n, self.begun, self.seen = n, 0, []

    def __iter__(self):
        self.begun += 1
        return iter(range(self.n))


def test_batches_are_taken_in_turn():
    weight = nn.Parameter(torch.ones(2))
    seen = []

    def loss_fn(batch):
        seen.append(int(batch))
        return weight.sum()

    tpgm = TPGM([("w", weight)], anchor="zero")
    counting = Counting(3)
    for steps in (2, 2, 3):
        tpgm.update(loss_fn, counting, steps=steps)
    assert (seen, counting.begun) == ([0, 1, 2, 0, 1, 2, 0], 3)
    tpgm.update(loss_fn, list(range(5, 8)), steps=4)
    assert seen[7:] == [5, 6, 7, 5]
    loader = DataLoader(torch.arange(4), batch_size=1, shuffle=True)
    before = torch.get_rng_state()
    tpgm.update(loss_fn, loader, steps=4)
    assert sorted(seen[11:]) == [0, 1, 2, 3]
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="batches ended after 3 and cannot begin again"):
        tpgm.update(loss_fn, (k for k in range(3)), steps=4)
    for empty in ([], (), Counting(0), iter(())):
        with pytest.raises(ValueError, match="batches is empty"):
            tpgm.update(loss_fn, empty)
    assert bool((weight == 1).all())


def test_autocast_does_not_remember_other_weights():
    model, pretrained, batches = fine_tuned(dtype=torch.float32, scale=1.0)
    cast = torch.autocast("cpu", dtype=torch.bfloat16)
    outside, inside = (TPGM(model, anchor=pretrained, lr=0.3) for _ in range(2))
    with cast:
        start = model.eval()(batches[0][0])
        outside.update(loss_of(model), batches, steps=4)
        assert torch.equal(model(batches[0][0]), start)
    inside.update(cast(loss_of(model)), batches, steps=4)
    assert all(map(torch.equal, outside.radii.values(), inside.radii.values()))


def test_progress_bar(capsys):
    weight = nn.Parameter(torch.ones(2))
    tpgm = TPGM([("w", weight)], anchor="zero")
    tpgm.update(lambda _: weight.sum(), [0], steps=30)
    assert capsys.readouterr().err == ""  # not a terminal
    tpgm.update(lambda _: weight.sum(), [0], steps=3, progress=True)
    assert "3/3" in capsys.readouterr().err
