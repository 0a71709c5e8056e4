"""The functional API: norms, projections and their slopes against plain differentiable torch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustft_kernels.finetune.projection import NORMS, deviation, interpolate_, project, project_
from robustft_kernels.testing import CASES

from .no_reads import NoReads
from .plain_projection import by_rows, norms_of, oracle

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ANCHORS = ("same", "zero", "bfloat16", "float64")


def ulp(x, dtype):
    exponent = torch.frexp(x.double().abs().clamp(min=torch.finfo(dtype).tiny)).exponent
    return torch.ldexp(torch.full_like(x, torch.finfo(dtype).eps, dtype=torch.float64), exponent - 1)


def numbers(dtype, anchored, seed=0, scale=0.3):
    """The tensors of all cases, their anchors as given, and the anchors in float64."""
    rng = torch.Generator().manual_seed(seed)
    params, anchors = [], []
    for case in CASES:
        theta_0 = torch.randn(case.shape, generator=rng, device="cpu").to(dtype)
        delta = scale * torch.randn(case.shape, generator=rng, device="cpu")
        params.append(case.lay((theta_0 + delta.to(dtype) if anchored != "zero" else delta).to(dtype)))
        anchors.append(theta_0.to(getattr(torch, anchored, dtype)))
    if anchored == "zero":
        return params, None, [torch.zeros_like(p, dtype=torch.float64) for p in params]
    return params, anchors, [a.double() for a in anchors]


def arithmetic(dtype):
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def rounding(param, theta_0):
    """How far storage and arithmetic may take an element from its exact value."""
    return ulp(param, param.dtype) + 3 * arithmetic(param.dtype) * (param.double().abs() + theta_0.abs())


def slack(param, theta_0, norm):
    """How far that may take n, with one value for each norm."""
    return norms_of(rounding(param, theta_0), norm)


def on(params, device):
    return None if params is None else [p.to(device) for p in params]


@pytest.mark.parametrize("anchored", ANCHORS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deviation_and_projection(device, dtype, norm, anchored):
    params, anchors, zero = numbers(dtype, anchored)
    before = [p.clone() for p in params]
    n = [norms_of(p.double() - a, norm) for p, a in zip(params, zero, strict=True)]
    there, anchors_there = on(params, device), on(anchors, device)
    for found, expected in zip(deviation(there, anchors_there, norm), n, strict=True):
        assert (found.dtype, found.device) == (torch.float64, there[0].device)
        torch.testing.assert_close(found.cpu(), expected, rtol=2 * arithmetic(dtype), atol=0)
    radii = torch.tensor([0.6 * float(k.max()) if i % 3 and k.numel() else 1e6 for i, k in enumerate(n)])
    project_(there, anchors_there, radii.double(), norm)
    for case, new, old, theta_0, gamma, of in zip(CASES, there, before, zero, radii.double(), n, strict=True):
        assert new.stride() == old.stride()
        new, expected = new.cpu(), oracle(old, theta_0, gamma, norm)
        room = ulp(expected, dtype) + 3 * arithmetic(dtype) * (old.double().abs() + theta_0.abs())
        assert bool(((new.double() - expected).abs() <= room).all()), case.name
        after = norms_of(new.double() - theta_0, norm)
        assert bool((after <= gamma + slack(old, theta_0, norm)).all()), case.name
        if bool((of <= gamma).all()):
            assert torch.equal(new, old), case.name
        elif norm == "mars_rows":
            assert torch.equal(by_rows(new)[of <= gamma], by_rows(old)[of <= gamma]), case.name
    assert anchors is None or all(torch.equal(a, b.cpu()) for a, b in zip(anchors, anchors_there, strict=True))


shapes = st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    shapes=shapes,
    norm=st.sampled_from(NORMS),
    dtype=st.sampled_from(DTYPES),
    radius=st.floats(1e-8, 1e3),
    scale=st.sampled_from((0.0, 1e-4, 1.0, 100.0)),
    anchored=st.booleans(),
    turn=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_projection_keeps_its_promises(shapes, norm, dtype, radius, scale, anchored, turn, seed):
    rng = torch.Generator().manual_seed(seed)

    def draw():
        return [torch.randn(shape, generator=rng) for shape in shapes]

    anchors = [a.to(dtype) for a in draw()] if anchored else None
    zero = [a.double() for a in anchors or [torch.zeros(shape) for shape in shapes]]
    params = [(z + scale * d).to(dtype) for z, d in zip(zero, draw(), strict=True)]
    start = [p.clone() for p in params]
    kept = [a.clone() for a in anchors or ()]
    turned = [p.clone() for p in params[turn:] + params[:turn]]

    project_(params, anchors, radius, norm)
    once = [p.clone() for p in params]
    room = [slack(p, z, norm) for p, z in zip(start, zero, strict=True)]
    for p, old, z, free in zip(params, start, zero, room, strict=True):
        assert bool((norms_of(p.double() - z, norm) <= radius + free).all())
        assert bool(((p.double() - z).abs() <= (old.double() - z).abs() + ulp(old, dtype)).all())  # α ∈ [0, 1]
    project_(params, anchors, radius, norm)
    for p, before, z, free in zip(params, once, zero, room, strict=True):
        excess = (free / radius).reshape(-1, 1) * by_rows((before.double() - z).abs())  # by how much n was above γ
        assert bool((by_rows((p.double() - before.double()).abs() - rounding(before, z)) <= excess).all())
    assert all(map(torch.equal, kept, anchors or ()))
    project_(turned, anchors and anchors[turn:] + anchors[:turn], radius, norm)
    assert all(map(torch.equal, turned, once[turn:] + once[:turn]))


def test_the_norms_differ():
    """Otherwise the tests above could pass for the wrong reason."""
    params = [torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])]
    results = {norm: [p.clone() for p in params] for norm in NORMS}
    for norm, projected in results.items():
        project_(projected, None, 2.0, norm)
    assert torch.allclose(results["l2"][0], params[0] * 2 / 26**0.5)
    assert torch.allclose(results["mars"][0], params[0] * 2 / 7)
    assert torch.allclose(results["mars_rows"][0], torch.tensor([[6 / 7, 8 / 7], [1, 0], [0, 0]]))
    assert torch.equal(deviation(params, None, "mars_rows")[0], torch.tensor([7.0, 1, 0], dtype=torch.float64))


@pytest.mark.parametrize("anchored", ["same", "zero"])
@pytest.mark.parametrize("norm", NORMS)
def test_slope_of_the_radius_against_autograd(norm, anchored):
    params, anchors, zero = numbers(torch.float64, anchored)
    weights = [torch.randn(p.shape, dtype=torch.float64) for p in params]
    n = [norms_of(p - a, norm) for p, a in zip(params, zero, strict=True)]
    middle = torch.stack([0.7 * k.mean() if k.numel() else torch.tensor(1.0).double() for k in n])
    middle[4], middle[7] = 1e6, middle[7] * 1e-9  # unconstrained; nearly at θ₀

    def slope_by(function, radius):
        gamma = radius.clone().requires_grad_()
        loss = sum((w * q).sum() + q.square().sum() for w, q in zip(weights, function(gamma), strict=True))
        return torch.autograd.grad(loss, gamma)[0], loss

    def plain(gamma):
        each = gamma.expand(len(params))
        return [oracle(p, z, g, norm) for p, z, g in zip(params, zero, each, strict=True)]

    for radius in (middle, middle[5:6].clone(), middle[5].clone()):
        ours, loss = slope_by(lambda gamma: project(params, anchors, gamma, norm), radius)
        theirs, expected = slope_by(plain, radius)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * float(theirs.abs().max()))
        assert ours.shape == radius.shape
        assert bool((ours != 0).any())
    ours, _ = slope_by(lambda gamma: project(params, anchors, list(gamma.unbind()), norm), middle)
    torch.testing.assert_close(ours, slope_by(plain, middle)[0], rtol=1e-9, atol=1e-9)
    assert ours[4] == 0


@pytest.mark.parametrize("norm", NORMS)
def test_project_gives_the_bits_of_project_(norm):
    params, anchors, _ = numbers(torch.bfloat16, "same")
    start = [p.clone() for p in params]
    leaves = [p.requires_grad_() for p in params]
    new = project(leaves, anchors, 0.5, norm)
    assert not any(q.requires_grad for q in new)
    gamma = torch.tensor(0.5, requires_grad=True)
    assert all(q.requires_grad for q in project(leaves, anchors, gamma, norm))
    sum(q.float().sum() for q in project(leaves, anchors, gamma, norm)).backward()
    assert gamma.grad.dtype == gamma.dtype
    assert all(p.grad is None for p in leaves)
    assert all(map(torch.equal, leaves, start))
    versions = [p._version for p in leaves]
    project_(leaves, anchors, 0.5, norm)
    assert all(map(torch.equal, leaves, new))
    assert all(p.is_leaf and p.requires_grad and p._version > v for p, v in zip(leaves, versions, strict=True))


def test_project_is_differentiable_once():
    gamma = torch.tensor(0.5, requires_grad=True)
    (slope,) = torch.autograd.grad(project([torch.ones(3, 3)], None, gamma)[0].square().sum(), gamma, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.backward()


def test_project_notices_that_params_moved():
    params, gamma = [torch.ones(3, 3)], torch.tensor(0.5, requires_grad=True)
    (projected,) = project(params, None, gamma)
    params[0] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        projected.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpolate(dtype):
    params, anchors, zero = numbers(dtype, "same")
    start = [p.clone() for p in params]
    interpolate_(params, anchors, 1.0)
    assert all(map(torch.equal, params, start))
    alphas = torch.arange(len(params)) % 3 / 2  # 0, ½, 1, 0 ...
    interpolate_(params, anchors, alphas)
    for p, old, anchor, theta_0, alpha in zip(params, start, anchors, zero, alphas.tolist(), strict=True):
        if alpha == 0.5:
            expected = (old.double() + theta_0) / 2
            room = ulp(expected, dtype) + 2 * arithmetic(dtype) * (old.double().abs() + theta_0.abs())
            assert bool(((p.double() - expected).abs() <= room).all())
        else:
            assert torch.equal(p, old if alpha else anchor)
    diverged = torch.tensor([1.0, torch.inf, torch.nan])
    interpolate_([diverged], [torch.arange(3.0)], 0)
    assert torch.equal(diverged, torch.arange(3.0))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_left_alone(bad, norm):
    params = [torch.tensor([[bad, 1.0], [4.0, 5.0]]), torch.full((2, 2), 7.0)]
    project_(params, None, 0.5, norm)
    expected = torch.tensor([[bad, 1.0], [4.0, 5.0]])
    if norm == "mars_rows":
        expected[1] *= 0.5 / 9
    torch.testing.assert_close(params[0], expected, equal_nan=True)
    assert float(deviation(params, None, norm)[1].max()) <= 0.5 + 1e-6


def test_radii_on_the_device_are_taken_as_they_are():
    for radius, alpha in ((torch.nan, 1.0), (torch.inf, 1.0), (0.0, 0.0), (-1.0, 0.0)):
        param = torch.ones(4)
        project_([param], None, torch.tensor(radius))
        assert torch.equal(param, torch.full((4,), alpha))


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_is_read_by_the_host(norm):
    params, anchors, _ = numbers(torch.float32, "same")
    gamma = torch.rand(len(params)).requires_grad_()
    with NoReads():
        deviation(params, anchors, norm)
        project_(params, anchors, gamma.detach(), norm)
        interpolate_(params, anchors, gamma.detach())
        sum(q.sum() for q in project(params, anchors, gamma, norm)).backward()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(gamma.sum())


P, A = [torch.ones(2, 3), torch.ones(4)], [torch.zeros(2, 3), torch.zeros(4)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, a: project_(p, a, 0.0), "radius must be above 0, got 0"),
        (lambda p, a: project_(p, a, float("nan")), "radius must be above 0, got nan"),
        (lambda p, a: project_(p, a, [1.0, -2]), r"radius\[1\] must be above 0, got -2"),
        (lambda p, a: project(p, a, -1), "radius must be above 0"),
        (lambda p, a: project_(p, a, [1.0]), "radius has 1 elements for 2 tensors"),
        (lambda p, a: project_(p, a, torch.ones(3)), "radius has 3 elements for 2 tensors"),
        (lambda p, a: project_(p, a, 1.0, "l1"), "unknown norm 'l1': choose one of 'l2', 'mars', 'mars_rows'"),
        (lambda p, a: deviation(p, a, "L2"), "unknown norm 'L2'"),
        (lambda p, a: project_(p, a[:1], 1.0), r"1 anchors for 2 params: there is no anchors\[1\]"),
        (lambda p, a: deviation(p[:1], a), r"2 anchors for 1 params: there is no params\[1\]"),
        (
            lambda p, a: project_(p, [a[0], torch.zeros(5)], 1.0),
            r"anchor of params\[1\] has shape \(5,\), the parameter \(4,\)",
        ),
        (
            lambda p, a: project_(p, [a[0], a[1].to("meta")], 1.0),
            r"anchor of params\[1\] is on meta, the parameter on cpu",
        ),
        (lambda p, a: project_([p[0], p[1].to("meta")], a, 1.0), r"params\[1\] is on meta, params\[0\] on cpu"),
        (lambda p, a: project_(p, [a[0], a[1].long()], 1.0), r"anchor of params\[1\] is torch.int64"),
        (lambda p, a: deviation([p[0], p[1].long()], a), r"params\[1\] is torch.int64"),
        (lambda p, a: project_([p[0], p[1][::2]], None, 1.0), r"params\[1\] has gaps or overlaps"),
        (lambda p, a: project_([p[0], torch.ones(1).expand(4)], None, 1.0), r"params\[1\] has gaps or overlaps"),
        (lambda p, a: interpolate_(p, a, 1.1), r"alpha must be in \[0, 1\], got 1.1"),
        (lambda p, a: interpolate_(p, a, float("nan")), r"alpha must be in \[0, 1\], got nan"),
        (lambda p, a: interpolate_(p, a, torch.ones(3)), "alpha has 3 elements for 2 tensors"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call, message):
    params, anchors = [p.clone() for p in P], [a.clone() for a in A]
    with pytest.raises(ValueError, match=message):
        call(params, anchors)
    assert all(map(torch.equal, params + anchors, P + A))


def test_takes_iterables_and_nothing():
    model = torch.nn.Linear(3, 2)
    project_(model.parameters(), (torch.zeros_like(p) for p in model.parameters()), 0.1)
    assert bool((deviation(model.parameters(), None) <= 0.1 + 1e-6).all())
    for norm in NORMS:
        assert len(deviation([], None, norm)) == 0
        project_([], [], 1.0, norm)
        assert project([], None, torch.tensor(1.0, requires_grad=True), norm) == []
    interpolate_([], None, 0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("norm", NORMS)
def test_replicas_alone(norm, request):
    """DTensors none of which is sharded."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    request.addfinalizer(torch.distributed.destroy_process_group)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    alone = [p.clone() for p in P]
    replicas = [distribute_tensor(p.clone(), mesh, [Replicate()]) for p in P]
    for params in (alone, replicas):
        project_(params, A, 0.3, norm)
        interpolate_(params, A, 0.9)
    for got, want in zip(replicas, alone, strict=True):
        torch.testing.assert_close(got.full_tensor(), want)
