"""The contract: schemas, fakes, the choice of a backend."""

import warnings
from dataclasses import replace

import pytest
import torch

import robustft_kernels as rft
from robustft_kernels.backends import native, registry
from robustft_kernels.core.bases import ADAMW, NO_STEP, SGD
from robustft_kernels.core.methods import MEASURES
from robustft_kernels.step.fingerprint import fingerprint
from robustft_kernels.testing import CASES, CHUNK, LEAN_CASES, SETTINGS, Stepper

from .test_steps import slow


@pytest.mark.parametrize("settings", SETTINGS[1:3] + SETTINGS[3:5], ids=lambda s: s.name)
@pytest.mark.parametrize("method", ["spd", "l2sp"])
def test_opcheck(backend, settings, method):
    stepper = Stepper(CASES[:8], settings, method, torch.float32)
    op = getattr(getattr(torch.ops.robustft, f"{settings.base.name}_"), backend)
    torch.library.opcheck(op, (stepper.params, stepper.grads(), *stepper.op_args()))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.name)
def test_op_is_the_prepared_step(backend, settings):
    op = getattr(getattr(torch.ops.robustft, f"{settings.base.name}_"), backend)
    one = Stepper(LEAN_CASES[:6] if slow(backend) else CASES, settings, "spd", torch.float32)
    grads, other = one.grads(), one.clone()
    op(one.params, grads, *one.op_args())
    other.run(backend, grads)
    assert all(map(torch.equal, one.tensors(), other.tensors()))


def test_mutation_bumps_versions(backend):
    """Autograd must notice that a saved parameter has changed."""
    param = torch.nn.Parameter(torch.ones(5))
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    stepper = Stepper(CASES[:1], SETTINGS[3], "none", torch.float32, anchored=False)
    stepper.params, (grad,) = [param], [param.grad]
    with torch.no_grad():
        stepper.run(backend, [grad])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING)
def test_native_tables_are_those_of_the_contract():
    from robustft_kernels import _native

    for base in (ADAMW, SGD, NO_STEP):
        assert tuple(getattr(_native, f"{base.name.upper()}_HYPER")) == base.hyper
    assert tuple(_native.MEASURES) == MEASURES
    assert _native.CHUNK == CHUNK, "or the cases do not reach several chunks"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s, a: a.__setitem__(0, s.anchors[:-1]), "anchors has 7 entries, too few"),
        (lambda s, a: a.__setitem__(0, [*s.anchors, s.anchors[0]]), "anchors has 9 entries; the groups take 8"),
        (
            lambda s, a: a.__setitem__(-4, torch.zeros(1, 2, dtype=torch.float64)),
            r"hyper must have a row for each of 1 groups and 16 columns.* got the shape \(1, 2\)",
        ),
        (lambda s, a: a.__setitem__(-3, [7]), "params has 8 entries; the groups take 7"),
        (lambda s, a: a.__setitem__(-2, ["magic"]), "no rule 'magic'; the rules are keep, l2sp"),
        (lambda s, a: a.__setitem__(-1, [1, 2]), "seeds has 2 entries for 8 params; give one each, or none"),
    ],
)
def test_ops_refuse_lists_that_do_not_fit(damage, message):
    stepper = Stepper(CASES[:8], SETTINGS[0], "spd", torch.float32)
    args, grads = stepper.op_args(), stepper.grads()
    damage(stepper, args)
    before = [t.clone() for t in stepper.tensors()]
    with pytest.raises(ValueError, match=message):
        torch.ops.robustft.adamw_.reference(stepper.params, grads, *args)
    assert all(torch.equal(a, b) for a, b in zip(stepper.tensors(), before, strict=True))


def _state(key, change):
    return lambda of: replace(of, state={**of.state, key: change(of.state[key])})


# Tensor 4 is a vector of 3 numbers called "case '3'". What is wrong with it, and what the message says of that.
MISFITS = {
    "dtype of the param": (lambda of: replace(of, param=of.param.int()), r"params\[4\], case '3',.*[Ii]nt"),
    "shape of the anchor": (lambda of: replace(of, anchor=torch.zeros(2)), r"anchor of params\[4\], case '3',.*3.*2"),
    "dtype of a moment": (_state("exp_avg_sq", torch.Tensor.half), r"exp_avg_sq of params\[4\], case '3',.*[Hh]al|16"),
    "shape of a moment": (_state("exp_avg", lambda t: t[None]), r"exp_avg of params\[4\], case '3',.*3.*1, ?3"),
    "learned numbers": (_state("radius_state", lambda t: t[:2]), r"radius_state of params\[4\], case '3',.*3.*2"),
    "dtype of the delta": (_state("delta", torch.Tensor.double), r"delta of params\[4\], case '3',.*64|[Dd]ouble"),
    "step": (lambda of: replace(of, step=of.step.double()), r"step of params\[4\], case '3',.*(64|[Dd]ouble)"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("kernels", ["triton", "native"])  # the oracle trusts its caller
def test_kernels_name_the_tensor_that_does_not_fit(kernels, misfit):
    """By its place and label, with what is expected and what was given. Nothing is written."""
    if missing := rft.backends()[kernels]:
        pytest.skip(missing)
    change, message = MISFITS[misfit]
    stepper = Stepper(CASES[:8], SETTINGS[0], "ftp", torch.float32)
    table, grads = stepper.table(), stepper.grads()
    tensors = [change(of) if k == 4 else of for k, of in enumerate(table.tensors)]
    before = [t.clone() for t in stepper.tensors()]
    with pytest.raises((RuntimeError, ValueError), match=message):
        registry.prepare(kernels, replace(table, tensors=tensors))(grads)
    assert all(torch.equal(a, b) for a, b in zip(stepper.tensors(), before, strict=True))


@pytest.mark.parametrize("kernels", ["triton", "native"])
@pytest.mark.parametrize("name", ["hyper", "results", "alphas"])
def test_kernels_name_the_table_that_does_not_fit(kernels, name):
    if missing := rft.backends()[kernels]:
        pytest.skip(missing)
    table = Stepper(CASES[:8], SETTINGS[0], "spd", torch.float32).table()
    for wrong in (getattr(table, name).float(), getattr(table, name)[..., :-1]):
        with pytest.raises((RuntimeError, ValueError), match=f"{name} must be a contiguous float64 .*, got "):
            registry.prepare(kernels, replace(table, **{name: wrong}))


def test_auto_takes_the_fastest_that_serves():
    cpu = torch.device("cpu")
    fastest = "reference" if rft.backends()["native"] else "native"
    registry._warned.add("cpu")
    assert registry.choose_backend("auto", cpu, {torch.float32}).name == fastest
    assert registry.choose_backend("reference", cpu, {torch.float32}).name == "reference"


def test_auto_says_once_that_it_is_slow(monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())
    with pytest.warns(RuntimeWarning, match="slow reference backend serves the meta parameters.*native: it serves CPU"):
        registry.choose_backend("auto", torch.device("meta"), {torch.float32})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.choose_backend("auto", torch.device("meta"), {torch.float32})


def test_a_backend_asked_for_by_name_serves_or_raises():
    with pytest.raises(ValueError, match="unknown backend 'numpy': choose one of 'auto', 'cuda', 'triton'"):
        registry.check_backend("numpy")
    for name in ("cuda", "triton"):
        if registry.BACKENDS[name].missing():
            with pytest.raises(RuntimeError, match=f"backend='{name}' is not available"):
                registry.check_backend(name)
    if not rft.backends()["triton"]:
        with pytest.raises(RuntimeError, match="it serves CPU tensors, not meta"):
            registry.choose_backend("triton", torch.device("meta"), {torch.float32})
    if not rft.backends()["native"]:
        with pytest.raises(RuntimeError, match="it serves CPU tensors, not meta"):
            registry.choose_backend("native", torch.device("meta"), {torch.float32})
        with pytest.raises(RuntimeError, match=r"it does not serve torch\.float8_e5m2"):
            registry.choose_backend("native", torch.device("cpu"), {torch.float8_e5m2})


class Other(torch.nn.Parameter):
    """A type of parameter that is not torch's."""


@pytest.mark.parametrize("addresses", [True, False])
@pytest.mark.parametrize("by", ["native", "python", "python, other types"])
def test_fingerprint_sees_every_change_but_gradient_addresses(by, addresses, monkeypatch):
    if by == "native" and native.MISSING:
        pytest.skip(native.MISSING)
    if by != "native":
        monkeypatch.setattr(native, "MISSING", "for this test")
    params = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    kept = [{"anchor": torch.zeros(4, 6)}, {}, {}]
    if by == "python, other types":
        params.append(Other(torch.randn(4, 6)))
        kept[0]["note"] = 3
    params[0].grad = torch.randn(4, 6)
    first = fingerprint(params, kept, addresses)
    params[0].grad = torch.randn(4, 6)
    assert fingerprint(params, kept, addresses) == first
    kept[0]["anchor"].data = torch.zeros(4, 6)
    assert (fingerprint(params, kept, addresses) != first) == addresses
    changes = [
        lambda: setattr(params[0], "grad", None),
        lambda: setattr(params[1], "grad", torch.randn(4, 6)),
        lambda: setattr(params[1], "grad", torch._efficientzerotensor((4, 6))),
        lambda: setattr(params[0], "grad", torch.randn(6, 4).t()),
        lambda: setattr(params[0], "grad", torch.randn(4, 6)),  # another gradient, in other strides
        lambda: setattr(params[2], "data", torch.randn(4, 6)),
        lambda: setattr(params[2], "data", torch.randn(6, 4).t()),
        lambda: setattr(params[2], "data", torch.randn(24)),
        lambda: setattr(params[2], "data", torch.randn(24).double()),
        lambda: kept[0].update(anchor=torch.zeros(4, 6)),
        lambda: kept[1].update(exp_avg=torch.zeros(4, 6)),
        lambda: kept[0].clear(),
        lambda: setattr(params[0], "data", params[0].data._neg_view()),
        lambda: params.reverse(),
        lambda: params.pop(),
    ]
    alive = list(kept[0].values())
    for change in changes:
        before = fingerprint(params, kept, addresses)
        assert fingerprint(params, kept, addresses, before) == before
        change()
        alive += kept[0].values()
        after = fingerprint(params, kept, addresses)
        assert after != before
        assert fingerprint(params, kept, addresses, before) == after, "compared as it comes"


@pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or "ready")
def test_an_equal_fingerprint_is_the_last_one_itself():
    params = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    first = fingerprint(params, [{}], True)
    assert fingerprint(params, [{}], True, first) is first
    longer = fingerprint([*params, params[0]], [{}], True, first)
    assert longer.startswith(first)
    assert longer != first
    assert fingerprint(params, [{}], True, longer) == first
    assert fingerprint([], [], True, first) == b""
