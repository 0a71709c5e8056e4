"""Moments in 8 bits: what codes stand for, that all backends write the same, and that they do for moments."""

import io

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.backends import reference_rounding as by_reference
from robustft_kernels.core.eight_bit import BLOCK, EIGHT_BIT, SCALE, decoded, encode, in_blocks
from robustft_kernels.testing import CHUNK, SETTINGS, Case, Stepper, assert_same_step
from robustft_kernels.testing.cases import misaligned

from .test_steps import slow

KINDS = {torch.int8: (127, 14), torch.uint8: (255, 16)}
CASES = (
    Case("rows of 32", (70, 32)),
    Case("rows of 96", (61, 96)),
    Case("misaligned", (37, 96), misaligned),
    Case("long rows", (2, CHUNK + 7 * BLOCK)),
    Case("no block", (37, 33)),
    Case("1-d", (96,)),
)
CODED = [settings for settings in SETTINGS if settings.state_dtype == EIGHT_BIT]


def coded(numbers, dtype):
    codes = torch.empty_like(numbers, dtype=dtype)
    scales = torch.zeros(len(numbers), numbers.shape[1] // BLOCK, dtype=torch.uint8)
    encode(numbers, codes, scales)
    return codes, scales


def numbers_of(dtype, rows=64):
    """Over many powers of two, from block to block and within each."""
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(rows, 3 * BLOCK, generator=generator, device="cpu").pow(3)
    x *= torch.logspace(-12, 12, rows, device="cpu")[:, None]
    return x if dtype == torch.int8 else x.square()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_code_is_a_square_times_a_power_of_two(dtype):
    """Every code, by its formula. The codes of what codes stand for are themselves."""
    most, bits = KINDS[dtype]
    k = torch.arange(-most if dtype == torch.int8 else 0, most + 1)
    codes = torch.full((8, 3 * BLOCK), most, dtype=dtype, device="cpu")
    codes.view(-1)[torch.arange(len(k)) * 768 // len(k)] = k.to(dtype)
    codes[:, ::BLOCK] = most  # so that each block needs its scale
    scales = torch.arange(24, dtype=torch.uint8, device="cpu").view(8, 3) * 10 + 17
    exact = codes.double() * codes.double().abs() / 2.0**bits
    exact *= 2.0 ** (scales.double() - 127).repeat_interleave(BLOCK, 1)
    assert torch.equal(decoded(codes, scales).double(), exact)
    assert torch.equal(by_reference.from_8_bit(codes, scales), exact)
    assert all(map(torch.equal, coded(exact.float(), dtype), (codes, scales)))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_error_is_half_the_distance_of_two_codes(dtype):
    """In √x this distance is the same everywhere: a 127th of the root of the largest number, or a 255th; √2 of it if
    the scale is not the best one. Of second moments, the smallest are rounded up by as much as the whole."""
    x = numbers_of(dtype)
    got = decoded(*coded(x, dtype))
    most, _ = KINDS[dtype]
    largest = x.abs().view(64, 3, BLOCK).amax(2).sqrt().repeat_interleave(BLOCK, 1)
    apart = (got.abs().sqrt() - x.abs().sqrt()).abs() / largest
    assert float(apart.max()) < (0.75 if dtype == torch.int8 else 1.01) * 2**0.5 / most
    assert ((got == 0) | (got.sign() == x.sign())).all()
    nearest = torch.full(x.shape, 2**15, device="cpu")
    codes, scales = coded(x, dtype)
    want, by_scales = by_reference.to_8_bit(x.double(), codes, nearest)
    assert torch.equal(codes, want)
    assert torch.equal(scales.view(-1, 1), by_scales.to(torch.uint8))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_rounding_is_unbiased(dtype):
    x = numbers_of(dtype, rows=8).repeat(400, 1)
    chance = torch.randint(2**16, x.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    codes, scales = by_reference.to_8_bit(x.double(), torch.empty_like(x, dtype=dtype), chance)
    mean = by_reference.from_8_bit(codes, scales.view(len(x), 3)).view(400, 8, -1).mean(0)
    most, _ = KINDS[dtype]
    largest = x[:8].abs().view(8, 3, BLOCK).amax(2).repeat_interleave(BLOCK, 1).double()
    within = x[:8].abs() < 0.98 * largest  # beyond the largest code there is none
    within &= x[:8].abs() > 2 * largest / most**2  # of the second moments, what is smaller is rounded up
    distance = 4 * (x[:8].abs().double() * largest).sqrt() / most
    assert ((mean - x[:8]).abs() < 5 * distance / 2 / 400**0.5)[within].all()


def test_what_is_no_number_and_what_is_zero():
    x = torch.zeros(4, BLOCK, device="cpu")
    x[0, 5], x[1, 5], x[2, 5], x[3, :2] = torch.nan, torch.inf, 1e-45, torch.tensor([1.0, 1e-12])
    for dtype in KINDS:
        codes, scales = coded(x, dtype)
        got = decoded(codes, scales)
        assert got[:2].isnan().all(), "the whole block tells"
        assert scales.view(-1).tolist()[:2] == [255, 255]
        assert got[2].count_nonzero() == (dtype == torch.uint8)
        assert abs(got[3, 0] - 1) < 0.02
        assert bool(codes[3, 1]) == (dtype == torch.uint8), "a second moment above 0 stays above 0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", CODED, ids=lambda s: s.name)
def test_backends_write_the_same_codes(backend, device, settings, dtype):
    """As the reference in float32. A number beside the border of two codes may go either way."""
    if not settings.acts_on(dtype):
        pytest.skip("none of its options acts on this dtype")
    got = Stepper(CASES, settings, "spd", dtype, device=device)
    for _ in range(2 if slow(backend) else 4):
        grads, before = got.grads(), got.clone()
        want, oracle = before.clone(), before.clone()
        want.run("reference", grads)
        oracle.run_oracle(grads)
        got.run(backend, grads)
        assert_same_step(got, oracle, before, grads)
        for key in settings.base.moments.keys() & {key for key, of in got.states.items() if of}:
            pairs = list(zip(got.states[key], want.states[key], strict=True))[:4]
            others = sum(int((a != b).sum()) for a, b in pairs)
            assert others <= 4e-4 * sum(a.numel() for a, _ in pairs), key
            assert all(int(a.count_nonzero()) > 0.7 * a.numel() for a, _ in pairs), key


def test_which_parameters_keep_codes():
    """Those whose rows are whole blocks side by side. The others keep float32, and float64 stays float64."""
    kinds = {
        "matrix": (torch.randn(3, 64), True),
        "conv": (torch.randn(4, 8, 2, 2), True),
        "channels last": (torch.randn(4, 8, 2, 2).to(memory_format=torch.channels_last), True),
        "half": (torch.randn(3, 64).half(), True),
        "vector": (torch.randn(64), False),
        "odd rows": (torch.randn(3, 40), False),
        "transposed": (torch.randn(64, 32).t(), False),
        "float64": (torch.randn(3, 64).double(), False),
        "empty": (torch.randn(0, 64), False),
    }
    params = [nn.Parameter(p) for p, _ in kinds.values()]
    optimizer = rft.AdamSPD(params, state_dtype="8bit", amsgrad=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, (name, (_, coded_here)) in zip(params, kinds.items(), strict=True):
        assert in_blocks(p) == coded_here, name
        kept = optimizer.state[p]
        plain = torch.float64 if p.dtype == torch.float64 else torch.float32
        assert kept["exp_avg"].dtype == (torch.int8 if coded_here else plain), name
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            assert kept[key].dtype == (torch.uint8 if coded_here else plain), name
            assert (key + SCALE in kept) == coded_here, name
    moments = [optimizer.state[params[0]][key] for key in ("exp_avg", "exp_avg_sq")]
    scales = [optimizer.state[params[0]][key] for key in ("exp_avg_scale", "exp_avg_sq_scale")]
    assert sum(of.nbytes for of in (*moments, *scales)) == 2 * (1 + 1 / BLOCK) * params[0].numel()


def test_moments_stay_near_those_in_float32(backend, device):
    """200 steps with β₂ = 0.99. To nearest, a second moment that falls by less than half the distance of two codes
    would stand still: after the gradients became a third, it would stay at nine times its value."""
    found = {}
    steps = 4 if slow(backend) else 200
    for state_dtype in ("8bit", torch.float32):
        param = nn.Parameter(torch.zeros(64, 64, device=device))
        optimizer = rft.AnchoredAdamW([param], lr=0.0, betas=(0.9, 0.99), state_dtype=state_dtype, backend=backend)
        generator = torch.Generator("cpu").manual_seed(0)
        sizes = torch.rand(64, 64, generator=generator, device="cpu") + 0.1
        for t in range(steps):
            grad = torch.randn(64, 64, generator=generator, device="cpu") * sizes / (3 if t > steps / 2 else 1)
            param.grad = grad.to(device)
            optimizer.step()
        kept = optimizer.state[param]
        found[state_dtype] = [
            decoded(kept[key], kept[key + SCALE]) if state_dtype == "8bit" else kept[key]
            for key in ("exp_avg", "exp_avg_sq")
        ]
    (m, v), (exact_m, exact_v) = found.values()
    assert abs(float((v.mean() / exact_v.mean()) - 1)) < 0.02
    assert float(((v - exact_v).abs() / exact_v).median()) < 0.1
    assert float((m - exact_m).norm() / exact_m.norm()) < 0.05


def test_checkpoints_change_their_kind(backend):
    """A checkpoint of codes loads where moments are in float32, and the other way. One whose weights lay otherwise in
    memory is decoded, and encoded anew."""
    if slow(backend):
        pytest.skip("the backend has no part in it")

    def of(state_dtype, layout=torch.contiguous_format):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(4, 8, 3, 4).to(memory_format=layout))
        return param, rft.AdamSPD([param], lr=1e-2, state_dtype=state_dtype, backend=backend)

    def stepped(param, optimizer):
        for t in range(3):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(t)).to(param)
            optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def numbers(optimizer, key):
        (kept,) = optimizer.state.values()
        return decoded(kept[key], kept[key + SCALE]) if key + SCALE in kept else kept[key]

    last = torch.channels_last
    for saved, loads in ((("8bit",), ("8bit", last)), ((torch.float32,), ("8bit",)), (("8bit",), (torch.float32,))):
        param, optimizer = of(*saved)
        checkpoint = stepped(param, optimizer)
        other, resumed = of(*loads)
        with torch.no_grad():
            other.copy_(param)
        resumed.load_state_dict(checkpoint)
        assert resumed.param_groups[0]["state_dtype"] == saved[0], "that of the checkpoint"
        resumed.param_groups[0]["state_dtype"] = loads[0]
        stepped(other, resumed)
        stepped(param, optimizer)
        for key in ("exp_avg", "exp_avg_sq"):
            a, b = numbers(optimizer, key), numbers(resumed, key)
            assert float((a - b).norm() / a.norm()) < 0.05, (saved, loads, key)


def test_a_gradient_that_is_no_number_is_not_hidden(backend, device):
    param = nn.Parameter(torch.ones(4, 64, device=device))
    optimizer = rft.AdamSPD([param], state_dtype="8bit", backend=backend)
    param.grad = torch.ones_like(param)
    param.grad[1, 3] = torch.nan
    optimizer.step()
    assert param.isnan().sum() == 1
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.isnan().sum() == BLOCK, "that of its block"
