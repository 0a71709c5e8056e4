"""Tensors that are not plain memory, and what else a user's habits bring: served as torch.optim serves them, or refused
by name before anything is changed."""

import copy
import warnings
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import robustft_kernels as rft
from robustft_kernels.core import memory

OPTIMIZERS = {
    "spd": rft.AdamSPD,
    "zero anchor": lambda params, **kw: rft.AdamSPD(params, anchor="zero", **kw),
    "sgd ftp": rft.SGDFTP,
    "around": lambda params, lr=1e-3, **kw: rft.Anchored(torch.optim.SGD(params, lr=lr), **kw),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def moved(make, backend, grad):
    param = nn.Parameter(torch.arange(35.0).reshape(5, 7))
    optimizer = make([param], lr=0.1, backend=backend)
    for _ in range(2):
        param.grad = grad()
        optimizer.step()
    return param


LAZILY_READ = {
    "negative": lambda: torch._neg_view(torch.full((5, 7), 2.0)),
    "imaginary part": lambda: torch.complex(torch.zeros(5, 7), torch.full((5, 7), 2.0)).conj().imag,
    "zeros without memory": lambda: torch._efficientzerotensor((5, 7)),
}


@pytest.mark.parametrize("kind", LAZILY_READ)
def test_gradients_that_are_read_with_a_change(make, backend, kind):
    grad = LAZILY_READ[kind]
    assert torch.equal(moved(make, backend, grad), moved(make, backend, lambda: grad() + torch.zeros(5, 7)))


def test_one_such_gradient_after_another(make):
    """The form of a gradient changes between steps: the plan must see it."""
    param = nn.Parameter(torch.zeros(3))
    twin = nn.Parameter(torch.zeros(3))
    optimizer, other = make([param], lr=0.1), make([twin], lr=0.1)
    for grad in (torch.ones(3), torch._neg_view(torch.ones(3)), torch._efficientzerotensor((3,)), torch.ones(3)):
        param.grad, twin.grad = grad, grad + torch.zeros(3)
        optimizer.step()
        other.step()
        assert torch.equal(param, twin)


def test_parameters_without_memory_are_refused_by_name(make, backend):
    def two(value):
        return TwoTensor(torch.full((3, 3), value), torch.full((3, 3), value))

    param = nn.Parameter(two(1.0))
    optimizer = make([("w", param)], backend=backend)
    param.grad = two(1.0)
    with pytest.raises(RuntimeError, match="parameter 'w' is a TwoTensor, whose numbers are not in its own memory"):
        optimizer.step()
    assert torch.equal(param.a, torch.ones(3, 3))
    plain = nn.Parameter(torch.ones(3, 3))
    optimizer = make([("v", plain)], backend=backend)
    plain.grad = two(1.0)
    with pytest.raises(RuntimeError, match="'v' has a gradient that is a TwoTensor"):
        optimizer.step()


def test_fake_tensors_are_refused_by_name(make):
    with FakeTensorMode():
        model = nn.Linear(8, 8)
        optimizer = make(model.parameters())
        model(torch.randn(2, 8)).sum().backward()
        with pytest.raises(RuntimeError, match=r"parameter 0 .* is a FakeTensor"):
            optimizer.step()


def test_anchors_without_memory_are_refused_by_name():
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"the anchor of parameter 0 .* is a TwoTensor"):
        rft.AdamSPD([param], anchor=[TwoTensor(torch.ones(3), torch.ones(3))])
    negative = torch._neg_view(torch.full((3,), 2.0))
    assert torch.equal(rft.AdamSPD([param], anchor=[negative]).state[param]["anchor"], torch.full((3,), -2.0))


@pytest.mark.parametrize("kind", ["meta", "lazy"])
def test_weights_that_come_after_the_optimizer(kind):
    """Parameters that have no memory when the optimizer is made take their anchors at their first step."""
    model = nn.Linear(4, 3, device="meta") if kind == "meta" else nn.LazyLinear(3)
    optimizer = rft.AdamSPD(model.parameters(), lr=0.1)
    if kind == "meta":
        for name, param in list(model.named_parameters()):
            param.grad = None
            data = torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name)))
            new = nn.Parameter(data)
            setattr(model, name, new)
            optimizer.param_groups[0]["params"][["weight", "bias"].index(name)] = new
    model(torch.ones(2, 4)).sum().backward()
    start = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert all(torch.equal(optimizer.state[p]["anchor"], t) for p, t in zip(model.parameters(), start, strict=True))


def test_frozen_integers_among_the_parameters(make):
    """QLoRA's quantised weights. A list of anchors has an entry for them, too."""
    param, frozen = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
    optimizer = make([frozen, param], lr=0.1)
    param.grad = torch.ones(4)
    optimizer.step()
    assert set(optimizer.state) == {param}
    assert optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    given = rft.AdamSPD([frozen, param], anchor=[frozen.detach(), torch.zeros(4)])
    assert torch.equal(given.state[param]["anchor"], torch.zeros(4))


class Quantised(torch.Tensor):
    """A floating-point tensor whose numbers are elsewhere, as torchao's are. It can be detached, and nothing else."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        if f is torch.ops.aten.detach.default:
            return cls(args[0].shape)
        raise NotImplementedError(f"{f} of a quantised tensor")


@pytest.mark.parametrize("named", [False, True])
def test_frozen_quantised_weights_among_the_parameters(make, backend, named):
    frozen, param = nn.Parameter(Quantised((4, 3)), requires_grad=False), nn.Parameter(torch.ones(4))
    optimizer = make([("frozen", frozen), ("w", param)] if named else [frozen, param], lr=0.1, backend=backend)
    for _ in range(2):
        param.grad = torch.ones(4)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(optimizer.state) == {param}
    assert (param < 1).all()
    if optimizer.param_groups[0]["anchor"] == "initial":
        optimizer.reanchor()
        assert torch.equal(optimizer.state[param]["anchor"], param.detach())
    frozen.requires_grad_().grad = Quantised((4, 3))
    before, param.grad = param.detach().clone(), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"is a Quantised, .*; a plain tensor or DTensor is needed"):
        optimizer.step()
    assert torch.equal(param, before)


def test_weights_written_after_the_optimizer_was_made():
    """They are the anchors, and one warning says so. The same numbers again, a checkpoint with anchors, and `reanchor`
    are no reason. After a state of torch.optim the anchors stay."""

    def step(write):
        model = nn.Linear(4, 4)
        optimizer = rft.AdamSPD(model.named_parameters(), lr=1e-3)
        with torch.no_grad():
            write(model, optimizer)
        model(torch.ones(2, 4)).sum().backward()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step()
            optimizer.step()
        return model, optimizer, [str(w.message) for w in seen]

    model, optimizer, seen = step(lambda model, _: [p.fill_(2) for p in model.parameters()])
    assert len(seen) == 1
    assert "the weights of parameter 'weight' were written after the optimizer was made" in seen[0]
    assert all((of["anchor"] == 2).all() for of in optimizer.state.values())
    assert all(0 < of.deviation < 0.1 for of in optimizer.telemetry().values())
    *_, seen = step(lambda model, _: model.weight.copy_(model.weight.clone()))
    assert not seen
    start = []

    def reanchored(model, optimizer):
        model.weight.add_(1)
        optimizer.reanchor()
        start.append(model.weight.clone())

    model, optimizer, seen = step(reanchored)
    assert not seen
    assert torch.equal(optimizer.state[model.weight]["anchor"], start[0])
    other = nn.Linear(4, 4)
    saved = rft.AdamSPD(other.named_parameters()).state_dict()

    def resumed(model, optimizer):
        model.load_state_dict(other.state_dict())
        optimizer.load_state_dict(saved)

    *_, seen = step(resumed)
    assert not seen

    def from_torch(model, optimizer):  # whose anchors are then those of the weights before
        model.load_state_dict(other.state_dict())
        optimizer.load_state_dict(torch.optim.AdamW(other.named_parameters()).state_dict())

    model, optimizer, seen = step(from_torch)
    assert len(seen) == 1
    assert "Anchors are the weights as they were then, before a state of torch.optim was loaded" in seen[0]
    assert all(of.deviation > 0.1 for of in optimizer.telemetry().values())


def test_a_parameter_appended_to_a_group_takes_its_anchor():
    first, late = nn.Parameter(torch.ones(4)), nn.Parameter(torch.full((3,), 2.0))
    optimizer = rft.AdamSPD([first], lr=0.1)
    first.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["params"].append(late)
    late.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(optimizer.state[late]["anchor"], torch.full((3,), 2.0))
    given = rft.AdamSPD([first], lr=0.1, anchor=[torch.zeros(4)])
    given.param_groups[0]["params"].append(late)
    with pytest.raises(
        ValueError, match=r"parameter 1 .* has no anchor: it is new in a group whose anchors are 'given'"
    ):
        given.step()


def test_a_parameter_that_takes_anothers_place_takes_its_anchor():
    """As after fully_shard, or Accelerate's prepare; and what left is freed."""
    old = nn.Parameter(torch.ones(4))
    optimizer = rft.AdamSPD([old], lr=0.1, anchor=[torch.full((4,), 3.0)])
    optimizer.state_dict()  # an early one, which makes the moments
    new = nn.Parameter(old.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    new.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(optimizer.state[new]["anchor"], torch.full((4,), 3.0))
    assert set(optimizer.state) == {new}


@pytest.mark.parametrize("options", [dict(anchor="zero"), dict(method="none")], ids=str)
def test_what_an_early_look_made_leaves_with_its_parameter(options):
    """Without anchors, nothing is taken over from it. What a step has used stays, as in torch.optim."""
    old = nn.Parameter(torch.ones(4))
    optimizer = rft.AnchoredAdamW([old], lr=0.1, **options)
    for stepped in (False, True):
        optimizer.state_dict()
        new = nn.Parameter(old.detach().clone())
        optimizer.param_groups[0]["params"][0] = new
        new.grad = torch.ones(4)
        optimizer.step()
        assert set(optimizer.state) == ({old, new} if stepped else {new})
        old = new


@pytest.mark.parametrize("make", [rft.AdamSPD, OPTIMIZERS["around"]])
def test_a_place_is_not_only_a_shape(make):
    """Of two that took the places of others of one shape, only the second has a gradient. A third is new, and one that
    has left is of its shape."""
    old = [nn.Parameter(torch.full((4,), float(k))) for k in range(3)]
    given = [torch.full((4,), 10.0 + k) for k in range(3)]
    optimizer = make([{"params": old[:2], "anchor": given[:2]}, {"params": old[2:]}], lr=0.1)
    new = [nn.Parameter(p.detach().clone()) for p in old]
    optimizer.param_groups[0]["params"][:] = new[:2]
    optimizer.param_groups[1]["params"][:] = [old[2], new[2]]
    new[1].grad, new[2].grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    assert torch.equal(optimizer.state[new[1]]["anchor"], given[1])
    assert torch.equal(optimizer.state[new[2]]["anchor"], old[2].detach())


def test_what_a_wrapped_optimizer_keeps_is_loaded_as_it_is():
    """Also None, and empty dictionaries, which are not ours to drop."""
    param = nn.Parameter(torch.ones(4))
    wrapped = rft.Anchored(torch.optim.SGD([param], lr=0.1))
    param.grad = torch.ones(4)
    wrapped.step()
    wrapped.optimizer.state[param].update(nothing=None, table={})
    wrapped.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    kept = wrapped.optimizer.state[param]
    assert kept["nothing"] is None
    assert kept["table"] == {}


def test_a_cleared_state_is_not_anchored_anew_in_silence():
    param = nn.Parameter(torch.ones(4))
    optimizer = rft.AdamSPD([param], lr=0.1)
    param.grad = torch.ones(4)
    optimizer.step()
    optimizer.state = defaultdict(dict)
    with pytest.raises(ValueError, match=r"parameter 0 .* has lost its anchor with its state; .* reanchor\(\)"):
        optimizer.step()
    optimizer.reanchor()
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_a_users_own_entries_stay_as_they_are():
    param = nn.Parameter(torch.ones(8, 4))
    optimizer = rft.AdamSPD([param], state_dtype=torch.bfloat16)
    param.grad = torch.ones(8, 4)
    optimizer.step()
    optimizer.state[param].update(ema=torch.tensor(1.25), slow=torch.full((8, 4), 1 / 3), note="mine", seen=[1, 2])
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    kept = optimizer.state[param]
    assert kept["ema"] == 1.25
    assert kept["slow"].dtype == torch.float32
    assert torch.equal(kept["slow"], torch.full((8, 4), 1 / 3))
    assert (kept["note"], kept["seen"]) == ("mine", [1, 2])
    assert kept["seen"] is not saved["state"][0]["seen"]


def test_parameters_that_leave_are_freed(make):
    import gc
    import weakref

    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}])
    for p in params:
        p.grad = torch.ones(4)
    optimizer.step()
    left = [weakref.ref(p) for p in params[1:]]
    group = optimizer.param_groups.pop()
    for p in group["params"]:
        optimizer.state.pop(p, None)
    del group, p, params[1:]
    optimizer.step()
    gc.collect()
    assert not [ref for ref in left if ref() is not None]


def test_the_groups_of_a_loaded_checkpoint_are_those_of_steps_in_backward():
    param = nn.Parameter(torch.ones(4))
    optimizer = rft.AdamSPD([param], lr=0.1)
    with rft.StepInBackward(optimizer):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = 0.0
        param.sum().backward()
        assert torch.equal(param, torch.ones(4))
        optimizer.param_groups[0]["lr"] = 0.5
        param.sum().backward()
        assert not torch.equal(param, torch.ones(4))


def test_clipping_has_the_precision_of_the_gradients(backend):
    param, grad = nn.Parameter(torch.zeros(3, dtype=torch.float64)), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    optimizer = rft.AnchoredSGD([param], lr=1.0, max_grad_norm=0.1, backend=backend)
    param.grad = grad.clone()
    optimizer.step()
    torch.testing.assert_close(param.detach(), -grad * 0.1 / (grad.norm() + 1e-6), rtol=1e-14, atol=0)


def test_a_row_of_nan_is_not_the_largest(backend):
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = rft.AnchoredSGD([weight], lr=1.0, method="mars_sp", strength=1.0, backend=backend)
    weight.data = torch.tensor([[torch.nan, 0.0], [1.0, 1.0], [5.0, 5.0]])
    weight.grad = torch.zeros(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    assert weight[1:].tolist() == [[1.0, 1.0], [4.0, 4.0]]


def test_memory_without_an_owner(device):
    for of in (torch.randn(3, 4, device=device).T, torch.ones((), dtype=torch.bfloat16, device=device)):
        other = memory.unowned(of)
        assert (other.shape, other.stride(), other.dtype, other.device) == (of.shape, of.stride(), of.dtype, of.device)
        of.add_(1)
        assert torch.equal(other, of)
    assert memory.unowned(torch.ones(0, 3, device=device)).shape == (0, 3)
