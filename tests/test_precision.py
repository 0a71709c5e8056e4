"""Stochastic rounding and gradient scaling, on every backend."""

import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.backends import native, reference_rounding, registry
from robustft_kernels.core.eight_bit import EIGHT_BIT
from robustft_kernels.testing import LEAN_CASES, SETTINGS, Stepper, assert_same_step
from robustft_kernels.testing.tolerances import ulp

from .test_steps import assert_bits, cases_of, settled, slow

STOCHASTIC = [s for s in SETTINGS if s.hyper["stochastic_rounding"]]


@pytest.mark.parametrize("stochastic", [True, False])
def test_the_mean_of_updates_below_half_an_ulp_survives(backend, device, stochastic):
    """40 steps of an eighth of a unit in the last place, from 1. They go five units up in the mean, with a deviation of
    the mean of 0.01. To nearest, nothing ever moves."""
    n, steps = 20000, 40
    param = nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=device))
    below = torch.finfo(torch.bfloat16).eps / 8
    optimizer = rft.AnchoredSGD([param], lr=below, stochastic_rounding=stochastic, maximize=True, backend=backend)
    for _ in range(steps):
        param.grad = torch.ones_like(param)
        optimizer.step()
    moved = (param.detach().double() - 1) / torch.finfo(torch.bfloat16).eps
    if stochastic:
        # A unit is added with probability 1/8. So the variance is 40·(1/8)(7/8) = 4.4 for each of 20,000. Six
        # deviations are allowed.
        assert abs(float(moved.mean()) - 5) < 6 * (4.4 / n) ** 0.5
        assert abs(float(moved.var()) - 4.4) < 0.4
        neighbours = torch.corrcoef(torch.stack([moved[:-1], moved[1:]]))[0, 1]
        assert abs(float(neighbours)) < 6 / n**0.5
    else:
        assert (moved == 0).all()


@pytest.mark.lean(keep=lambda settings, norm, **_: settings is STOCHASTIC[0] or norm is None)
@pytest.mark.parametrize(("method", "norm"), [("l2sp", None), ("project", "l2"), ("project", "mars_rows")])
@pytest.mark.parametrize("settings", STOCHASTIC, ids=lambda s: s.name)
def test_every_backend_draws_the_same_bits(backend, device, settings, method, norm):
    """A pull onto the anchor (α = 0) has no arithmetic to differ in. Every backend rounds float32 anchors once. This is
    so in the sweep that steps, in the one that pulls, and by rows."""
    cases = cases_of(backend)
    got = Stepper(cases, settings, method, torch.bfloat16, torch.float32, device=device, norm=norm)
    got.settings = settings.but(strength=1e9, radius=0.0)
    want, grads = got.clone(), got.grads()
    want.run_oracle(grads)
    got.run(backend, grads)
    assert all(map(torch.equal, got.params, want.params))
    assert any((p.float() != a.to(p.dtype).float()).any() for p, a in zip(got.params, got.anchors, strict=True))


def test_every_backend_draws_the_same_bits_for_moments(backend, device):
    """From zero, with 1 − β a power of two, there is one rounding to float32 before the one to bfloat16."""
    settings = next(s for s in STOCHASTIC if s.state_dtype == torch.bfloat16)
    settings = settings.but(beta1=0.5, beta2=0.75)
    got = Stepper(LEAN_CASES, settings, "none", torch.float32, anchored=False, device=device)
    want, grads = got.clone(), got.grads()
    want.run("reference", grads)
    got.run(backend, grads)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert all(map(torch.equal, got.states[key], want.states[key])), key


def test_moments_are_rounded_up_as_often_as_they_should_and_apart(backend, device):
    """The first moment lies a quarter of a unit above 1, the second a half. So each goes up as often as that, whatever
    the other and the neighbours do."""
    n, ulp = 20000, torch.finfo(torch.bfloat16).eps
    param = nn.Parameter(torch.ones(n, device=device))
    optimizer = rft.AnchoredAdamW([param], betas=(0.5, 0.75), state_dtype=torch.bfloat16, backend=backend)
    param.grad = torch.full_like(param, 2 * (1 + ulp / 4))
    optimizer.step()
    up = [(optimizer.state[param][key].double() - 1) / ulp for key in ("exp_avg", "exp_avg_sq")]
    for of_one, chance in zip(up, (1 / 4, 1 / 2 + ulp / 16), strict=True):
        assert ((of_one == 0) | (of_one == 1)).all()
        assert abs(float(of_one.mean()) - chance) < 6 * (chance * (1 - chance) / n) ** 0.5
    for one, other in (up, (up[0][1:], up[0][:-1]), (up[1][1:], up[1][:-1])):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 6 / n**0.5


MOMENTS = {"exp_avg": "beta1", "exp_avg_sq": "beta2", "momentum_buffer": "momentum"}  # and what they decay by
KEEPING = [s for s in SETTINGS if s.hyper.get("momentum") != 0 and s.state_dtype != EIGHT_BIT]


@pytest.mark.lean(keep=lambda settings, dtype, **_: dtype == torch.float32 and settings in (KEEPING[0], *STOCHASTIC))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.0, pytest.param(1e-3, marks=pytest.mark.full), 0.7])
@pytest.mark.parametrize("settings", KEEPING, ids=lambda s: s.name)
def test_moments_forget_what_was_far_larger(backend, device, settings, decay, dtype):
    """A gradient a billion times smaller than the last. The error is a few roundings of βm and of (1 − β)g, whatever m
    is. With β = 0 the moment is g itself."""
    settings = settings.but(**{key: decay for key in MOMENTS.values() if settings.hyper.get(key)}, weight_decay=0)
    got = Stepper(cases_of(backend), settings, "none", dtype, anchored=False, device=device)
    got.run("reference", [g * 2.0**20 for g in got.grads()])
    grads, before = [g * 2.0**-10 for g in got.grads()], got.clone()
    want = before.clone()
    want.run_oracle(grads)
    got.run(backend, grads)
    assert_same_step(got, want, before, grads)
    for key in MOMENTS.keys() & {key for key, of in got.states.items() if of}:
        for a, b, old in zip(got.states[key], want.states[key], before.states[key], strict=True):
            exact, stored = b.double(), (decay * old).double()
            near = 4 * ulp(stored, dtype) + 4 * ulp(exact - stored, dtype) + (a.dtype != dtype) * ulp(exact, a.dtype)
            assert ((a.double() - exact).abs() <= near).all(), key
    if decay == 0 and settings.base.name == "adamw" and settings.state_dtype == torch.float32:
        sign = -1 if settings.hyper["maximize"] else 1
        assert all(torch.equal(m, sign * g.to(m.dtype)) for m, g in zip(got.states["exp_avg"], grads, strict=True))


def test_seed_parameter_step_and_place_tell_the_bits(backend, device):
    def run(seed, steps=1, shapes=((300,), (300,)), transposed=False):
        params = [nn.Parameter(torch.ones(s, dtype=torch.bfloat16, device=device)) for s in shapes]
        optimizer = rft.AnchoredSGD(params, lr=1e-3, stochastic_rounding=True, seed=seed, backend=backend)
        for _ in range(steps):
            for p in params:
                p.data.fill_(1)
                p.grad = torch.ones_like(p)
            optimizer.step()
        return [p.detach().flatten() for p in params], optimizer.state_dict()

    first, saved = run(7)
    assert saved["param_groups"][0]["seed"] & 0xFFFFFFFF == 7
    assert all(map(torch.equal, run(7)[0], first))
    assert not torch.equal(*first), "two parameters of one seed"
    assert not torch.equal(run(8)[0][0], first[0])
    assert not torch.equal(run(7, steps=2)[0][0], first[0])
    assert torch.equal(run(7, shapes=((300,),))[0][0], first[0])


def test_mix_is_murmurhash3():
    """Its published test vectors: the finalizer of 0, 1 and 2³² − 1."""
    assert reference_rounding.mix(torch.tensor([0, 1, 0xFFFFFFFF], dtype=torch.int64)).tolist() == [
        0,
        0x514E28B7,
        0x81F16F39,
    ]


def test_stochastic_rounding_resumes(backend, device):
    """A resumed run repeats the bits of the uninterrupted one."""
    start = torch.randn(700, device=device).bfloat16()

    def steps(optimizer, param, ts):
        for t in ts:
            param.grad = torch.full_like(param, 0.01 * (t + 1))
            optimizer.step()

    def fresh():
        param = nn.Parameter(start.clone())
        return param, rft.AdamSPD([param], lr=1e-4, stochastic_rounding=True, seed=3, backend=backend)

    param, optimizer = fresh()
    steps(optimizer, param, range(3))
    resumed, second = fresh()
    second.load_state_dict(optimizer.state_dict())
    resumed.data.copy_(param.data)
    steps(optimizer, param, range(3, 6))
    steps(second, resumed, range(3, 6))
    assert torch.equal(param, resumed)


def test_float16_and_bad_seeds_are_refused():
    half = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"shape \(3,\)\) is float16; stochastic_rounding is for bfloat16"):
        rft.AdamSPD([half], stochastic_rounding=True)
    for seed in (-1, 2**31, 1.0, True):
        with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
            rft.AdamSPD([nn.Parameter(torch.zeros(3))], seed=seed)


@pytest.mark.parametrize("settings", SETTINGS[:1] + SETTINGS[2:3] + SETTINGS[4:5], ids=lambda s: s.name)
def test_gradients_are_unscaled_in_the_step(backend, device, settings):
    """A power of two loses nothing. The bits are those of a step with the gradients themselves."""
    got = settled(cases_of(backend), settings, "spd", torch.float32, device=device)
    want, grads = got.clone(), got.grads()
    scale, clear = torch.tensor(1024.0, device=device), torch.tensor(0.0, device=device)
    registry.prepare(backend, got.table())([g * 1024 for g in grads], scale, clear)
    want.run(backend, grads)
    if backend == "reference":  # it computes both ways alike
        assert_bits(got, want)
    for a, b in zip(got.tensors(), want.tensors(), strict=True):
        assert torch.allclose(a.nan_to_num(), b.nan_to_num(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS[:1] + SETTINGS[2:3] + SETTINGS[4:5], ids=lambda s: s.name)
@pytest.mark.parametrize("method", ["spd", "l2sp"])
def test_found_inf_leaves_everything_as_it_was(backend, device, settings, method):
    got = settled(cases_of(backend), settings, method, torch.float32, device=device)
    before, grads = got.clone(), got.grads()
    for g in grads:
        g.fill_(torch.inf)
    scale, found = torch.tensor(2.0, device=device), torch.tensor(1.0, device=device)
    registry.prepare(backend, got.table())(grads, scale, found)
    assert_bits(got, before)


def test_grad_scaler(backend, device):
    """torch.amp.GradScaler unscales in the step, and skips an infinite one, as with plain gradients."""
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(40, 30).to(device)
        optimizer = rft.AdamSPD(model.parameters(), lr=1e-2, backend=backend)
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=2, enabled=scaled)
        generator = torch.Generator("cpu").manual_seed(1)
        for t in range(2 if slow(backend) else 6):
            x = torch.randn(8, 40, generator=generator, device="cpu").to(device)
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if scaled and t == 1:
                model.weight.grad[0, 0] = torch.inf
                before = [p.detach().clone() for p in model.parameters()]
                scaler.step(optimizer)
                scaler.update()
                assert all(map(torch.equal, model.parameters(), before))
                assert optimizer.state[model.weight]["step"] == t
                assert scaler.get_scale() == 128.0
                optimizer.zero_grad()
                scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert not hasattr(optimizer, "found_inf")
        results.append(list(model.parameters()))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"stochastic_rounding": True}, {"state_dtype": torch.bfloat16}, {}])
def test_a_checkpoint_tells_which_random_bits_it_was_written_with(options):
    """Those of 0.3.0 and before told nothing. They load, and a warning says what changes."""
    params = [nn.Parameter(torch.ones(300, dtype=torch.bfloat16))]
    optimizer = rft.AdamSPD(params, seed=7, **options)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["seed"] == 7 + (2 << 32) * bool(options)
    saved["param_groups"][0]["seed"] = 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["seed"] == 7
    with pytest.warns(UserWarning, match="other random bits") if options else nullcontext():
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("draw", [0, 16])
def test_random_bits_are_even_and_alone(draw):
    """16 bits for each of 2²⁰ places, at two steps and in two phases: no value, pair of neighbours or pair of steps
    comes too often. Over 2¹⁶ or 2⁸ classes, χ² lies within six deviations of its mean."""

    def of(t, phase, count=2**20):
        key = reference_rounding.mix(torch.tensor(t * 4 + phase))
        key = reference_rounding.mix(key ^ 7)
        places = torch.arange(count)
        return reference_rounding.mix(places ^ key, reference_rounding.mix(key)) >> draw & 0xFFFF

    def even(classes, count):
        found = torch.bincount(classes, minlength=count).double()
        expected = len(classes) / count
        chi2 = float(((found - expected) ** 2 / expected).sum())
        assert abs(chi2 - (count - 1)) < 6 * (2 * (count - 1)) ** 0.5, chi2

    one, later, moments = of(1, 0), of(2, 0), of(1, 2)
    for bits in (one, later, moments):
        even(bits >> 8, 2**8)
        even(bits & 0xFF, 2**8)
        for step in (1, 2, 4, 256):
            even((bits[:-step] >> 8) * 256 + (bits[step:] >> 8), 2**16)
            even((bits[:-step] & 0xFF) * 256 + (bits[step:] & 0xFF), 2**16)
    for other in (later, moments):
        even((one >> 8) * 256 + (other >> 8), 2**16)
        even((one & 0xFF) * 256 + (other & 0xFF), 2**16)
    both = reference_rounding.mix(torch.arange(2**20) ^ 5, torch.tensor(9))
    even((both >> 24) * 256 + (both >> 8 & 0xFF), 2**16)  # the two moments of an element


@pytest.mark.full
@pytest.mark.skipif(bool(native.MISSING), reason="the reference would take 30 bytes an element")
def test_random_bits_beyond_2_to_the_32_elements():
    """One chunk holds the places before and after 2³². It takes 9 GB, since numpy's zeros take memory when written."""
    at, tail = 2**32 - 300, 1000
    param, grad = (torch.from_numpy(np.zeros(at + tail, "int16")).view(torch.bfloat16) for _ in range(2))
    param = nn.Parameter(param)
    param.grad = grad
    param.grad[at:] = 1 + 2**-7
    rft.AnchoredSGD([param], lr=1 / 3, method="spd", anchor="zero", stochastic_rounding=True, backend="native").step()
    key = reference_rounding.mix(reference_rounding.mix(reference_rounding.mix(torch.tensor(4))))
    places = at + torch.arange(tail)
    bits = reference_rounding.mix(places & 0xFFFFFFFF ^ key, reference_rounding.mix(key + (places >> 32) & 0xFFFFFFFF))
    exact = (torch.zeros(tail) - torch.tensor(1 / 3) * param.grad[at:].float()).view(torch.int32).long() & 0xFFFFFFFF
    want = (exact + (bits >> 16) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    assert torch.equal(param[at:].float(), want)
    assert not any(part.any() for part in param[:at].split(2**28))
