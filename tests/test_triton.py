"""What the Triton backend alone has: its two forms, its bits, and hyper-parameters that it reads where they are."""

import pytest
import torch
import triton
import triton.language as tl
from robustft_kernels.triton_kernels import chunk
from torch import nn

import robustft_kernels as rft
from robustft_kernels.backends import native, reference_rounding, registry
from robustft_kernels.backends import triton as triton_backend
from robustft_kernels.testing import CASES, DTYPES, SETTINGS, Stepper

from .test_steps import assert_bits, assert_same_step, cases_of, settled
from .test_wrapper import far, make, run

pytestmark = pytest.mark.skipif(bool(rft.backends()["triton"]), reason=rft.backends()["triton"] or "ready")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", SETTINGS[:1] + SETTINGS[2:3] + SETTINGS[4:5] + SETTINGS[-2:-1], ids=lambda s: s.name
)
def test_one_launch_equals_the_oracle(device, settings, dtype):
    got = settled(cases_of("triton"), settings, "spd", dtype, device=device)
    for _ in range(2):  # the second finds counters, flags and cursor as the first left them
        want, before, grads = got.clone(), got.clone(), got.grads()
        want.run_oracle(grads)
        got.run("triton_tickets", grads)
        assert_same_step(got, want, before, grads)
    assert (got.alphas < 1).any()


@triton.jit
def draw(out, begin, key, N: tl.constexpr):
    start = tl.load(begin)
    tl.store(out + tl.arange(0, N), chunk.random_bits(start + tl.arange(0, N), start, key.to(tl.uint32)))


@pytest.mark.parametrize("begin", [0, 2**32 - 100, 2**32, 3 * 2**32 - 1])
def test_random_bits_are_those_of_the_place_beyond_2_to_the_32_too(device, begin):
    key, n = 0xDEADBEEF, 256
    found = torch.zeros(n, dtype=torch.int64, device=device)
    draw[(1,)](found, torch.tensor([begin], device=device), key, n)
    places = begin + torch.arange(n, device=device)
    low, high = places & 0xFFFFFFFF, places >> 32
    want = reference_rounding.mix(low ^ key, reference_rounding.mix((key + high) & 0xFFFFFFFF))
    assert torch.equal(found, want)


def test_a_prepared_step_repeats(device):
    """Scratch, counters and the ring of uploads are left fit for the next step, in both forms."""
    for backend in ("triton", "triton_tickets"):
        got = settled(CASES[7:11], SETTINGS[0], "spd", torch.float32, device=device)
        want = got.clone()
        run = registry.prepare(backend, got.table())
        for _ in range(3):
            grads = got.grads()
            run(grads)
            want.run(backend, grads)
            assert_bits(got, want)


@pytest.mark.skipif(bool(native.MISSING) or not triton_backend.interpreted(), reason="needs the native backend beside")
@pytest.mark.lean(keep=lambda dtype, **_: dtype in (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.name)
def test_bits_of_the_native_backend(settings, dtype):
    """The base step has them, and so has the pull whose α needs no sums. Sums have another order, so that the α of
    other methods may differ by a rounding. (The interpreter's roots are exact, as tests/ptx shows of the compiled.)"""
    for method in ("l2sp", "spd"):
        got = settled(CASES[:9], settings, method, dtype)
        want, grads = got.clone(), got.grads()
        got.run("triton", grads)
        want.run("native", grads)
        for key, of in want.states.items():
            if key != "master":
                assert all(map(torch.equal, got.states[key], of)), key
        unpulled = [k for k, alpha in enumerate(want.alphas) if method == "l2sp" or (alpha == 1 == got.alphas[k])]
        assert unpulled
        for of, wanted in ((got.params, want.params), (got.states.get("master"), want.states.get("master"))):
            assert not of or all(torch.equal(of[k], wanted[k]) for k in unpulled)


def test_hyper_parameters_in_tensors_are_read_where_they_are(device):
    """float32 or float64, changed in place between steps, without a word to the host. They act as plain numbers do."""
    start = [torch.randn(700, device=device), torch.randn(20000, device=device)]
    lr, strength = torch.tensor(1e-2, device=device), torch.tensor(1.5, dtype=torch.float64, device=device)
    results = []
    for tensors in (True, False):
        params = [nn.Parameter(p.clone()) for p in start]
        optimizer = rft.AdamSPD(params, lr=lr.fill_(1e-2) if tensors else 1e-2, strength=strength if tensors else 1.5,
                                backend="triton")  # fmt: skip
        generator = torch.Generator("cpu").manual_seed(0)
        for t in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(device)
            if tensors:
                lr.fill_(1e-2 / (t + 1))
            else:
                optimizer.param_groups[0]["lr"] = torch.tensor(1e-2 / (t + 1)).item()
            optimizer.step()
        if tensors:
            (launch,) = optimizer._plans.current.launches
            assert launch.hyper.table[0, 0] == 0, "the host has read the tensor"
        results.append(params)
    assert all(map(torch.equal, *results))


def test_anchored_state_moves_between_backends(device):
    """Step counts go to the device for the Triton backend, and back."""
    param = nn.Parameter(torch.randn(100, device=device))
    first = rft.AdamSPD([param], backend="triton")
    param.grad = torch.randn_like(param)
    first.step()
    assert first.state[param]["step"].device.type == device.type
    second = rft.AdamSPD([param], backend="reference")
    second.load_state_dict(first.state_dict())
    second.step()
    assert second.state[param]["step"] == 2
    first.load_state_dict(second.state_dict())
    first.step()
    assert first.state[param]["step"] == 3


def test_first_arguments_that_fit_nothing(device):
    stepper = Stepper(CASES[7:9], SETTINGS[0], "spd", torch.float32, device=device)
    run = registry.prepare("triton", stepper.table())
    with pytest.raises(ValueError, match="2 params but 1 grads"):
        run(stepper.grads()[:1])
    expected = r"grad of params\[0\], case 'tile, .*', must be of shape \(1105,\) .*, got .* of shape \(1104,\)"
    with pytest.raises(ValueError, match=expected):
        run([g[1:] for g in stepper.grads()])


@pytest.mark.parametrize("pull", [{"strength": 1.3}, {"method": "project", "radius": 0.1, "norm": "mars_rows"}])
@pytest.mark.parametrize("wrap", [False, True])
def test_telemetry_and_the_wrapper(device, wrap, pull):
    """They are as in the reference, up to the roundings that the two do in different orders."""
    options = {"method": "spd", **pull}
    found = {}
    for backend in ("triton", "reference"):
        params = [nn.Parameter(p.detach().to(device)) for p in make(torch.float32)]
        if wrap:
            optimizer = rft.Anchored(torch.optim.AdamW(params, lr=1e-2), backend=backend, **options)
        else:
            optimizer = rft.AnchoredAdamW(params, lr=1e-2, weight_decay=1e-2, backend=backend, **options)
        run(optimizer, params, steps=4)
        found[backend] = params, optimizer.telemetry()
    assert far(found["triton"][0], found["reference"][0]) <= 16
    for name, of in found["reference"][1].items():
        assert found["triton"][1][name] == pytest.approx(of, abs=1e-4, rel=1e-4, nan_ok=True), name
    assert any(float(of.selections) > 0 for of in found["triton"][1].values())
