"""The contract: schemas, fakes, the choice of a backend."""

import warnings

import pytest
import torch

from robustft_kernels import ops
from robustft_kernels.bases import ADAMW, SGD
from robustft_kernels.testing import CASES, CHUNK, SETTINGS, Stepper

BASES = (ADAMW, SGD)


@pytest.mark.parametrize("settings", SETTINGS[1:3] + SETTINGS[3:5], ids=lambda s: s.name)
@pytest.mark.parametrize("method", ["spd", "l2sp"])
def test_opcheck(backend, settings, method):
    stepper = Stepper(CASES[:8], settings, method, torch.float32)
    op = getattr(getattr(torch.ops.robustft, f"{settings.base.name}_"), backend)
    torch.library.opcheck(op, (stepper.params, stepper.grads(), *stepper.args()))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.name)
def test_op_is_the_prepared_step(backend, settings):
    op = getattr(getattr(torch.ops.robustft, f"{settings.base.name}_"), backend)
    one = Stepper(CASES, settings, "spd", torch.float32)
    grads, other = one.grads(), one.clone()
    op(one.params, grads, *one.args())
    other.run(ops.PREPARE[backend][settings.base.name], grads)
    assert all(map(torch.equal, one.tensors(), other.tensors()))


def test_mutation_bumps_versions(backend):
    """Autograd must notice that a saved parameter has changed."""
    param = torch.nn.Parameter(torch.ones(5))
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    stepper = Stepper(CASES[:1], SETTINGS[3], "none", torch.float32, anchored=False)
    stepper.params, (grad,) = [param], [param.grad]
    with torch.no_grad():
        stepper.run(ops.PREPARE[backend]["sgd"], [grad])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(bool(ops.NATIVE_MISSING), reason=ops.NATIVE_MISSING)
def test_native_table_has_the_contract_columns():
    assert tuple(ops._native.ADAMW_HYPER) == ADAMW.hyper
    assert tuple(ops._native.SGD_HYPER) == SGD.hyper
    assert ops._native.CHUNK == CHUNK, "or the cases do not reach several chunks"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s, a: a.__setitem__(0, s.anchors[:-1]), "anchors has 7 entries, too few"),
        (lambda s, a: a.__setitem__(0, [*s.anchors, s.anchors[0]]), "anchors has 9 entries; the groups take 8"),
        (lambda s, a: a.__setitem__(1, [t.clone().unsqueeze(0) for t in a[1]]), "a tensor of the state has not"),
        (lambda s, a: a.__setitem__(-4, torch.zeros(1, 2, dtype=torch.float64)), "hyper must be"),
        (lambda s, a: a.__setitem__(-3, [7]), "params has 8 entries; the groups take 7"),
        (lambda s, a: a.__setitem__(-2, ["magic"]), "no rule 'magic'"),
        (lambda s, a: a.__setitem__(-1, [1, 2]), "seeds has 2 entries for 8 params; give one each, or none"),
        (lambda s, a: s.params.__setitem__(3, s.params[3].to(torch.int32)), r"does not take (torch\.i|I)nt"),
    ],
)
@pytest.mark.parametrize("kernels", ["triton", "native"])  # the oracle trusts its caller
def test_kernels_refuse_lists_that_do_not_fit(kernels, damage, message):
    if missing := ops.backends()[kernels]:
        pytest.skip(missing)
    stepper = Stepper(CASES[:8], SETTINGS[0], "spd", torch.float32)
    args, grads = stepper.args(), stepper.grads()
    damage(stepper, args)
    before = [t.clone() for t in stepper.tensors()]
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.PREPARE[kernels]["adamw"](stepper.params, *args)(grads)
    assert all(torch.equal(a, b) for a, b in zip(stepper.tensors(), before, strict=True))


def test_auto_takes_the_fastest_that_serves():
    cpu = torch.device("cpu")
    fastest = "reference" if ops.NATIVE_MISSING else "native"
    ops._warned.add("cpu")
    assert ops.choose_backend("auto", cpu, {torch.float32}) == fastest
    assert ops.choose_backend("reference", cpu, {torch.float32}) == "reference"


def test_auto_says_once_that_it_is_slow(monkeypatch):
    monkeypatch.setattr(ops, "_warned", set())
    with pytest.warns(RuntimeWarning, match="slow reference backend serves the meta parameters.*native: it serves CPU"):
        ops.choose_backend("auto", torch.device("meta"), {torch.float32})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.choose_backend("auto", torch.device("meta"), {torch.float32})


def test_a_backend_asked_for_by_name_serves_or_raises():
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        ops.check_backend("cuda")
    if ops.backends()["triton"]:
        with pytest.raises(RuntimeError, match="backend='triton' is not available"):
            ops.check_backend("triton")
    else:
        with pytest.raises(RuntimeError, match="it serves CPU tensors, not meta"):
            ops.choose_backend("triton", torch.device("meta"), {torch.float32})
    if not ops.NATIVE_MISSING:
        with pytest.raises(RuntimeError, match="it serves CPU tensors, not meta"):
            ops.choose_backend("native", torch.device("meta"), {torch.float32})
        with pytest.raises(RuntimeError, match=r"it does not serve torch\.float8_e5m2"):
            ops.choose_backend("native", torch.device("cpu"), {torch.float8_e5m2})


@pytest.mark.parametrize("addresses", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_fingerprint_sees_every_change_but_gradient_addresses(native, addresses, monkeypatch):
    if native and ops.NATIVE_MISSING:
        pytest.skip(ops.NATIVE_MISSING)
    if not native:
        monkeypatch.setattr(ops, "_native", None)
    params = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    kept = [{"anchor": torch.zeros(4, 6), "note": 3}, {}, {}]
    params[0].grad = torch.randn(4, 6)
    first = ops.fingerprint(params, kept, addresses)
    params[0].grad = torch.randn(4, 6)
    assert ops.fingerprint(params, kept, addresses) == first
    kept[0]["anchor"].data = torch.zeros(4, 6)
    assert (ops.fingerprint(params, kept, addresses) != first) == addresses
    changes = [
        lambda: setattr(params[0], "grad", None),
        lambda: setattr(params[1], "grad", torch.randn(4, 6)),
        lambda: setattr(params[0], "grad", torch.randn(6, 4).t()),
        lambda: setattr(params[0], "grad", torch.randn(4, 6)),  # from one gradient to another in other strides
        lambda: setattr(params[2], "data", torch.randn(4, 6)),
        lambda: setattr(params[2], "data", torch.randn(6, 4).t()),
        lambda: setattr(params[2], "data", torch.randn(24)),
        lambda: setattr(params[2], "data", torch.randn(24).double()),
        lambda: kept[0].update(anchor=torch.zeros(4, 6)),
        lambda: kept[1].update(exp_avg=torch.zeros(4, 6)),
        lambda: kept[0].clear(),
        lambda: params.reverse(),
        lambda: params.pop(),
    ]
    alive = list(kept[0].values())
    for change in changes:
        before = ops.fingerprint(params, kept, addresses)
        change()
        alive += kept[0].values()
        assert ops.fingerprint(params, kept, addresses) != before
