"""Each method against what its paper says, written out in plain torch and autograd. Its state, and what it refuses."""

import copy
from math import inf, nan

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.backends.triton import interpreted

SHAPES = ((12, 7), (5,), (4, 3, 3, 3), (3, 20000))


@pytest.fixture
def model_of(backend):
    """Parameters of SHAPES, but without the long one in Triton's interpreter."""
    shapes = SHAPES[:-1] if backend.startswith("triton") and interpreted() else SHAPES

    def make(dtype=torch.float64):
        generator = torch.Generator("cpu").manual_seed(0)
        return [
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
        ]

    return make


def stream(params, steps, seed=1):
    """Gradients that lead away from the start, except in some steps."""
    generator = torch.Generator("cpu").manual_seed(seed)
    start = [p.detach().clone() for p in params]
    for t in range(steps):
        for p, p0 in zip(params, start, strict=True):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.grad = (0.3 * noise + p0.sign()) * (-1 if t % 3 else 0.5)
        yield t + 1


def rows_of(tensor):
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)


@pytest.mark.parametrize("k", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_ftp_follows_the_paper(model_of, backend, base, k):
    """Six steps of Algorithm 1 as the paper has it. It keeps c and its norms from step to step."""
    params = model_of()
    if base == "adam":
        optimizer = rft.AdamFTP(params, lr=0.05, weight_decay=0.1, k=k, radius_lr=0.3, backend=backend)
        plain = [nn.Parameter(p.detach().clone()) for p in params]
        inner = torch.optim.AdamW(plain, lr=0.05, weight_decay=0.1)
    else:
        optimizer = rft.SGDFTP(params, lr=0.05, momentum=0.9, weight_decay=0.1, k=k, radius_lr=0.3, backend=backend)
        plain = [nn.Parameter(p.detach().clone()) for p in params]
        inner = torch.optim.SGD(plain, lr=0.05, momentum=0.9, weight_decay=0.1)
    start = [p.detach().clone() for p in params]
    kept = [None] * len(params)
    for t in stream(params, 6):
        for p, q in zip(params, plain, strict=True):
            q.grad = p.grad.clone()
        inner.step()
        optimizer.step()
        for i, (p, q, p0) in enumerate(zip(params, plain, start, strict=True)):
            c = rows_of(q.detach() - p0)
            n = c.abs().sum(1) + 1e-8
            if kept[i] is None:
                radius, m, v = torch.tensor(1e-8), torch.zeros(()), torch.zeros(())
            else:
                radius, m, v, c_before, n_before = kept[i]
                h = ((rows_of(q.grad) * c_before).sum(1) / n_before).sum()
                h = k * h if h > 0 else h
                m, v = 0.9 * m + 0.1 * h, 0.999 * v + 0.001 * h * h
                radius = radius - 0.3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            radius = radius.double().clamp(min=1e-8).minimum(n.max())
            kept[i] = radius, m, v, c, n
            alpha = (radius / n).clamp(max=1)
            with torch.no_grad():
                q.copy_(p0 + (alpha[:, None] * c).reshape(q.shape))
            assert torch.allclose(optimizer.state[p]["radius_state"][0], radius, rtol=1e-9), t
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-12), t
        if t == 1:
            assert all((p - p0).abs().max() <= 1e-8 for p, p0 in zip(params, start, strict=True))
    assert max(float((p.detach() - p0).abs().max()) for p, p0 in zip(params, start, strict=True)) > 1e-3


def test_ftp_cannot_do_without_its_delta(model_of, backend):
    """After the first step the float32 weights are θ₀ again, except for a few near 0. Only the delta has the direction
    that the slope needs."""
    params = model_of(torch.float32)
    start = [p.detach().clone() for p in params]
    optimizer = rft.AdamFTP(params, backend=backend)
    for t in stream(params, 2):
        optimizer.step()
        if t == 1:
            moved = sum(int((p != p0).sum()) for p, p0 in zip(params, start, strict=True))
            assert moved < 0.05 * sum(p.numel() for p in params)
            assert all(optimizer.state[p]["delta"].abs().max() > 1e-4 for p in params)
    assert all(optimizer.state[p]["radius_state"][1] != 0 for p in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ftp_resumes_bit_for_bit(model_of, backend, dtype):
    """Also if a parameter had no gradient for a step, and with rows that never move. Those stay finite."""
    params = model_of(dtype)
    optimizer = rft.AdamFTP(params, lr=0.01, radius_lr=0.1, backend=backend)
    resumed, copies = None, []
    for t in stream(params, 6):
        params[0].grad[3:] = 0
        if t == 3:
            params[1].grad = None
        optimizer.step()
        if resumed is not None:
            for p, q in zip(params, copies, strict=True):
                q.grad = None if p.grad is None else p.grad.clone()
            resumed.step()
        if t == 2:
            copies = [nn.Parameter(p.detach().clone()) for p in params]
            resumed = rft.AdamFTP(copies, backend=backend)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(map(torch.equal, params, copies))
    assert all(p.isfinite().all() for p in params)
    for p, q in zip(params, copies, strict=True):
        assert optimizer.state[p].keys() == resumed.state[q].keys() >= {"delta", "radius_state", "anchor", "step"}
        assert all(torch.equal(optimizer.state[p][key], resumed.state[q][key]) for key in optimizer.state[p])
    assert optimizer.state[params[1]]["step"] == 5


@pytest.mark.parametrize("method", ["l2sp_coupled", "mars_sp"])
@pytest.mark.parametrize("base", ["adam", "sgd"])
@pytest.mark.parametrize("anchor", ["initial", "zero"])
def test_penalties_are_those_of_the_loss(model_of, backend, method, base, anchor):
    """½·strength·‖θ − θ₀‖², or strength·maxᵢ Σ|θᵢ − θ₀ᵢ|, differentiated by autograd and given to torch.optim."""
    params, strength = model_of(), 0.7
    plain = [nn.Parameter(p.detach().clone()) for p in params]
    start = [torch.zeros_like(p) if anchor == "zero" else p.detach().clone() for p in params]
    options = {"method": method, "strength": strength, "anchor": anchor, "backend": backend, "lr": 0.05}
    if base == "adam":
        optimizer, inner = rft.AnchoredAdamW(params, **options), torch.optim.Adam(plain, lr=0.05)
    else:
        optimizer = rft.AnchoredSGD(params, momentum=0.9, **options)
        inner = torch.optim.SGD(plain, lr=0.05, momentum=0.9)
    for _ in stream(params, 4):
        for p, q, p0 in zip(params, plain, start, strict=True):
            c = rows_of(q - p0)
            penalty = 0.5 * c.square().sum() if method == "l2sp_coupled" else c.abs().sum(1).amax()
            (slope,) = torch.autograd.grad(strength * penalty, q)
            q.grad = p.grad + slope
        inner.step()
        optimizer.step()
    assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(params, plain, strict=True))


def pair_of(base, model_of, **options):
    """One of our optimizers, and torch's with the same base over copies."""
    params = model_of()
    plain = [nn.Parameter(p.detach().clone()) for p in params]
    if base == "adam":
        ours, inner = rft.AnchoredAdamW(params, lr=0.05, weight_decay=0.1, **options), torch.optim.AdamW
        return params, plain, ours, inner(plain, lr=0.05, weight_decay=0.1)
    ours, inner = rft.AnchoredSGD(params, lr=0.05, momentum=0.9, **options), torch.optim.SGD
    return params, plain, ours, inner(plain, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("base", ["adam", "sgd"])
@pytest.mark.parametrize("anchor", ["initial", "zero"])
def test_cautious_decay_follows_the_paper(model_of, backend, base, anchor):
    """x ← x − lr(u + λ·1[u∘x ≥ 0]∘x), of the weights for a zero anchor, else of their deviation."""
    strength = 3.0
    options = dict(method="l2sp_cautious", strength=strength, anchor=anchor, backend=backend)
    params, plain, optimizer, inner = pair_of(base, model_of, **options)
    start = [torch.zeros_like(p) if anchor == "zero" else p.detach().clone() for p in params]
    held = []
    for t in stream(params, 6):
        for p, q in zip(params, plain, strict=True):
            q.grad = p.grad.clone()
        before = [q.detach().clone() for q in plain]
        inner.step()
        optimizer.step()
        for q, old, p0 in zip(plain, before, start, strict=True):
            u, d = (old - q.detach()) / 0.05, old - p0
            mask = u * d >= 0
            held.append((mask & (d != 0)).double().mean())
            with torch.no_grad():
                q -= 0.05 * strength * (mask * d)
        assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(params, plain, strict=True)), t
    assert 0.1 < float(torch.stack(held).mean()) < 0.9
    assert all(of.alpha == pytest.approx(1 - 0.05 * strength) for of in optimizer.telemetry().values())


@pytest.mark.parametrize("base", ["adam", "sgd"])
@pytest.mark.parametrize("anchor", ["initial", "zero"])
@pytest.mark.parametrize("strength", [0.6, 2.0])
def test_digrap_takes_the_gradient_apart(model_of, backend, base, anchor, strength):
    """It loses what leads away from θ₀, if it does, and torch.optim goes on from there. Above 1, strength is 1."""
    options = dict(method="digrap", strength=strength, anchor=anchor, backend=backend)
    params, plain, optimizer, inner = pair_of(base, model_of, **options)
    start = [torch.zeros_like(p) if anchor == "zero" else p.detach().clone() for p in params]
    conflicts = []
    for t in stream(params, 6):
        for p, q, p0 in zip(params, plain, start, strict=True):
            d = q.detach() - p0
            dot = (p.grad * d).sum()
            conflicts.append(bool(dot < 0))
            q.grad = p.grad - min(1, strength) * dot / d.square().sum() * d if dot < 0 else p.grad.clone()
            if strength > 1 and dot < 0:
                assert abs(float((q.grad * d).sum())) < 1e-9 * abs(float(dot))
        inner.step()
        optimizer.step()
        assert all(torch.allclose(p, q, rtol=1e-7, atol=1e-9) for p, q in zip(params, plain, strict=True)), t
    assert 3 < sum(conflicts) < len(conflicts) - 3


@pytest.mark.parametrize("norm", ["l2", "mars", "mars_rows"])
def test_pgm_holds_its_radius(model_of, backend, norm):
    """After each step n ≤ radius. The radius is a tensor, which is read anew. Another group has a norm of its own."""
    params = model_of(torch.float32)
    start = [p.detach().clone() for p in params]
    radius = torch.tensor(0.5)
    groups = [{"params": params[:2], "radius": radius}, {"params": params[2:], "norm": "l2", "radius": 3.0}]
    optimizer = rft.AdamPGM(groups, lr=0.1, norm=norm, backend=backend)
    norms = {"l2": torch.Tensor.norm, "mars": lambda c: rows_of(c).abs().sum(1).max()}
    norms["mars_rows"] = norms["mars"]
    for t in stream(params, 4):
        radius.fill_(0.5 / t)
        optimizer.step()
        found = [norms[norm]((p.detach() - p0).double()) for p, p0 in zip(params[:2], start, strict=False)]
        assert max(found) <= 0.5 / t * (1 + 1e-5)
        assert max(found) >= 0.49 / t, "the radius should be made use of"
        assert all(
            norms["l2"]((p.detach() - p0).double()) <= 3 * (1 + 1e-5) for p, p0 in zip(params, start, strict=True)
        )


def test_spd_by_rows_is_spd_of_each_row(backend):
    """Rows become parameters of their own, with one element each. For those Σ|·| and ‖·‖ are the same."""
    params, alone = [nn.Parameter(torch.randn(40, 1, dtype=torch.float64))], []
    alone = [nn.Parameter(params[0].detach()[i].clone()) for i in range(40)]
    together = rft.AdamSPD(params, lr=0.05, norm="mars_rows", strength=1.5, backend=backend)
    single = rft.AdamSPD(alone, lr=0.05, strength=1.5, backend=backend)
    fired = 0
    for _ in stream(params, 6):
        for i, p in enumerate(alone):
            p.grad = params[0].grad[i].clone()
        together.step()
        single.step()
        fired += sum(int(of.alphas.ne(1).sum()) for of in together._plans.current.launches)
    assert fired > 20
    assert torch.allclose(params[0], torch.stack(list(alone)), rtol=1e-10)


def test_a_plain_small_step_moves_back_where_the_gate_is_open(model_of, backend):
    """c = d − lr·g, so ‖c‖² − ‖d‖² = lr²‖g‖² − 2·lr·⟨g,d⟩. It is below 0 for a small lr, and no strength changes a bit.
    The other gate lets strength act."""
    runs = {}
    for gate, strength in (("inconsistent", 0.0), ("inconsistent", 0.01), ("inconsistent", 1.0), ("away", 0.5)):
        params = model_of(torch.float32)
        optimizer = rft.SGDSPD(params, lr=1e-3, strength=strength, gate=gate, backend=backend)
        start = [p.detach().clone() for p in params]
        for turn in (-1.0, -1.0, -1.0, -1.0, 0.5, 0.5):  # four steps away, and two of half their length back
            for p, p0 in zip(params, start, strict=True):
                p.grad = turn * p0.sign()
            optimizer.step()
        runs[gate, strength] = params, list(optimizer.telemetry().values())
    free, told = runs["inconsistent", 0.0]
    assert all(of.inconsistencies == 2 and of.selections == 0 for of in told)
    for strength in (0.01, 1.0):
        assert all(map(torch.equal, free, runs["inconsistent", strength][0]))
        assert all(of.selections == 0 for of in runs["inconsistent", strength][1])
    held, told = runs["away", 0.5]
    assert not any(map(torch.equal, free, held))
    assert all(of.selections == 4 and of.inconsistencies == 2 for of in told)


@pytest.mark.parametrize("norm", ["l2", "mars_rows"])
def test_the_gate_away_takes_its_share_of_each_step(backend, norm):
    """A layer's distance grows by 1 − strength of what the step adds to it. What leads back is left alone."""
    param, strength = nn.Parameter(torch.randn(6, 9, dtype=torch.float64)), 0.3
    start = param.detach().clone()
    free = nn.Parameter(start.clone())
    optimizer = rft.AdamSPD([param], lr=0.05, strength=strength, gate="away", norm=norm, backend=backend)
    inner = torch.optim.Adam([free], lr=0.05)

    def size(of):
        c = rows_of(of.detach() - start)
        return c.norm().reshape(1) if norm == "l2" else c.abs().sum(1)

    grew = []
    for _ in stream([param], 6):
        before = size(param)
        with torch.no_grad():
            free.copy_(param)
        free.grad = param.grad.clone()
        inner.step()
        optimizer.step()
        after = size(free)
        grew.append(after > before)
        want = torch.where(grew[-1], before + (1 - strength) * (after - before), after)
        assert torch.allclose(size(param), want, rtol=1e-9)
    grew = torch.stack(grew)
    assert grew[0].all()
    assert not grew.all()


def test_a_gate_is_chosen_by_group_and_saved():
    """Methods without a gate pass it over. The paper's is in no group, and a checkpoint without one means the
    paper's."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [a]}, {"params": [b], "method": "l2sp"}]
    optimizer = rft.AdamSPD(groups, gate="away", strength=0.5)
    saved = optimizer.state_dict()
    assert [group["gate"] for group in saved["param_groups"]] == ["away", "away"]
    plain = rft.AdamSPD([{"params": [a]}, {"params": [b], "method": "l2sp"}])
    assert all("gate" not in group for group in plain.state_dict()["param_groups"])
    older = plain.state_dict()
    plain.load_state_dict(saved)
    assert plain.param_groups[0]["gate"] == "away"
    plain.load_state_dict(older)
    assert "gate" not in plain.param_groups[0]
    wrapped = rft.Anchored(torch.optim.SGD([a], lr=0.1), gate="away", strength=0.5)
    assert wrapped.state_dict()["param_groups"][0]["gate"] == "away"
    older = rft.Anchored(torch.optim.SGD([a], lr=0.1)).state_dict()
    assert "gate" not in older["param_groups"][0]
    wrapped.load_state_dict(older)
    assert "gate" not in wrapped.param_groups[0]
    of_model = rft.for_model("SGDSPD", head="1", gate="away", strength=0.5)(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    )
    assert [group["method"] for group in of_model.param_groups] == ["spd", "none"]


@pytest.mark.parametrize("make", [rft.AdamSPD, lambda p, **of: rft.Anchored(torch.optim.SGD(p, lr=0.1), **of)])
def test_a_gate_that_lets_nothing_move_warns(make, recwarn):
    make([nn.Parameter(torch.ones(3))], gate="away", strength=0.99)
    make([nn.Parameter(torch.ones(3))], gate="away", strength=torch.tensor(1.0))  # a tensor is not read
    assert not recwarn
    with pytest.warns(UserWarning, match=r"gate='away' with strength=1.0 lets no layer move away"):
        make([nn.Parameter(torch.ones(3))], gate="away")


NAMED = {
    "AdamSPD": "spd", "SGDSPD": "spd", "AdamL2SP": "l2sp", "SGDL2SP": "l2sp", "AdamFTP": "ftp", "SGDFTP": "ftp",
    "AdamPGM": "project", "SGDPGM": "project",
}  # fmt: skip


@pytest.mark.parametrize(("name", "method"), NAMED.items())
def test_named_optimizers_are_a_base_with_a_method(name, method):
    optimizer = getattr(rft, name)([nn.Parameter(torch.zeros(3))], radius=1.0)
    assert isinstance(optimizer, rft.AnchoredAdamW if name.startswith("Adam") else rft.AnchoredSGD)
    assert optimizer.param_groups[0]["method"] == method


BAD = [
    ({"method": "project"}, "needs radius, finite and above 0"),
    ({"method": "project", "radius": 0.0}, "radius must be finite and above 0"),
    ({"method": "project", "radius": -1.0}, "radius must be finite and above 0"),
    ({"method": "project", "radius": nan}, "radius must be finite"),
    ({"method": "project", "radius": inf}, "radius must be finite"),
    ({"method": "project", "radius": torch.ones(2)}, "2 radii for 1 parameters: radius is one number, one for"),
    ({"method": "project", "radius": 1.0, "norm": "l1"}, "does not go with norm='l1': choose 'l2' or 'mars'"),
    ({"method": "spd", "norm": "mars"}, "does not go with norm='mars'"),
    ({"method": "ftp", "k": 1.5}, r"k must be in \[0, 1\]"),
    ({"method": "ftp", "k": -0.1}, r"k must be in \[0, 1\]"),
    ({"method": "ftp", "radius_betas": (0.9, 1.0)}, r"radius_betas\[1\] must be in"),
    ({"method": "ftp", "radius_lr": nan}, "radius_lr must be finite"),
    ({"method": "tpgm"}, "unknown method 'tpgm'"),
    ({"method": "spd", "gate": "open"}, "unknown gate 'open': choose 'inconsistent' or 'away'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_is_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        rft.AnchoredAdamW([nn.Parameter(torch.zeros(3))], **options)


def test_a_group_edited_to_project_without_a_radius_changes_nothing():
    param = nn.Parameter(torch.ones(3))
    optimizer = rft.AdamSPD([param])
    param.grad = torch.ones(3)
    optimizer.param_groups[0]["method"] = "project"
    with pytest.raises(ValueError, match="needs radius, finite and above 0"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))
