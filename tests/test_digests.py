"""Digests of anchors: what they are, what they tell apart, and that checkpoints are held to them."""

import copy
import hashlib

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.backends import digests
from tests.test_optimizers import make, run
from tests.test_state import copies, saved_and_loaded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
SHAPES = [(), (3,), (0,), (4, 0), (1, 1), (33001,), (7, 5), (64, 300), (8, 4, 3, 3), (2, 1, 40000)]
LAYOUTS = {
    "as indexed": torch.clone,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
}


def expected(tensor):
    """By the definition, element by element, in Python's own integers."""
    width, of_integers = tensor.itemsize, {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().flatten().view(of_integers[width]).tolist()
    sums = []
    for weyl in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03):
        total = 0
        for index, value in enumerate(bits):
            x = (value % 2 ** (8 * width) + index * weyl) % 2**64
            for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
                x = (x ^ x >> 33) * factor % 2**64
            total += x ^ x >> 33
        sums.append(total % 2**64)
    head = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16).digest()
    content = b"".join(of.to_bytes(8, "little") for of in sums) + head
    return torch.tensor(list(content), dtype=torch.uint8, device="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_is_by_its_definition(dtype, device, monkeypatch):
    """Whatever the layout in memory, and with or without the extension."""
    for shape in SHAPES:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), device="cpu").to(dtype)
        want = expected(tensor)
        for name, layout in LAYOUTS.items():
            laid = layout(tensor.float()).to(device, dtype)
            assert torch.equal(digests.digest(laid), want), (shape, name)
            with monkeypatch.context() as without:
                without.setattr(digests.native, "digest", lambda *_: None)
                without.setattr(digests, "PIECE_ON_CPU", 1000)
                assert torch.equal(digests.digest(laid.clone()), want), (shape, name)


@pytest.mark.parametrize("threads", [2, 5])
def test_its_bits_do_not_depend_on_the_threads(threads):
    tensor = torch.randn(300, 1111)
    want = expected(tensor)
    torch.set_num_threads(threads)
    assert torch.equal(digests.digest(tensor), want)
    assert torch.equal(digests.digest(tensor.t().contiguous().t()), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_flipped_bit_shows(dtype):
    tensor = torch.randn(4, 3).to(dtype)
    bits = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16)
    seen = {bytes(digests.digest(tensor))}
    for k in range(tensor.numel()):
        for bit in range(8 * tensor.itemsize):
            mask = -(2**31) if bit == 31 else -(2**15) if bit == 15 and dtype != torch.float32 else 2**bit
            bits.view(-1)[k] ^= mask
            seen.add(bytes(digests.digest(tensor)))
            bits.view(-1)[k] ^= mask
    assert len(seen) == 1 + 8 * tensor.nbytes


def test_what_a_digest_tells_apart():
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    a, b = zeros.clone(), zeros.clone()
    a[0, 0], b[0, 1] = 1, 1  # the same numbers in another order
    others = [
        ones,
        zeros,
        a,
        b,
        zeros.view(3, 2),
        zeros.bfloat16(),
        zeros.half(),
        -zeros,
        torch.zeros(6),
        torch.zeros(0),
    ]
    assert len({bytes(digests.digest(tensor)) for tensor in others}) == len(others)
    before = digests.digest(ones)
    ones[0, 0] = 2  # it is written in place
    assert not torch.equal(digests.digest(ones), before)


def sha256(anchor):
    """What checkpoints of 0.3.0 have in place of a digest."""
    content = f"{anchor.dtype} {tuple(anchor.shape)} ".encode() + anchor.contiguous().numpy().tobytes()
    return torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)


def test_digests_alone_are_compared_with_the_anchors_that_are_here():
    params = make()
    saved = saved_and_loaded(rft.AdamSPD(params, lr=1e-2, save_anchors="digest").state_dict())
    assert all(set(of) >= {"anchor_digest"} and "anchor" not in of for of in saved["state"].values())
    earlier = copy.deepcopy(saved)
    for p, of in zip(params, earlier["state"].values(), strict=True):
        of["anchor_digest"] = sha256(p.detach())
    for checkpoint in (saved, earlier):
        rft.AdamSPD(copies(make()), save_anchors="digest").load_state_dict(checkpoint)
        with pytest.raises(ValueError, match="is not the one that the checkpoint was made with"):
            rft.AdamSPD(copies(p * 2 for p in make())).load_state_dict(checkpoint)


OPTIMIZERS = {
    "AdamSPD": lambda params: rft.AdamSPD(params, lr=1e-2),
    "SGDFTP": lambda params: rft.SGDFTP(params, lr=1e-2, momentum=0.9),
    "Anchored": lambda params: rft.Anchored(torch.optim.AdamW(params, lr=1e-2)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("flipped", [0, 2, 5])
def test_a_damaged_anchor_is_refused_by_name(kind, flipped):
    """Nothing is changed by that. Without its digest it would be loaded."""
    params = make()
    optimizer = OPTIMIZERS[kind]([(f"w{k}", p) for k, p in enumerate(params)])
    run(optimizer, params, 2)
    saved = saved_and_loaded(optimizer.state_dict())
    saved["state"][flipped]["anchor"].view(torch.int32).view(-1)[-1] ^= 4
    others = copies(p * 3 for p in make())
    resumed = OPTIMIZERS[kind]([(f"w{k}", p) for k, p in enumerate(others)])
    run(resumed, others, 1)
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(ValueError, match=f"the checkpoint's anchor of parameter 'w{flipped}' is damaged"):
        resumed.load_state_dict(saved)
    for of, was in zip(resumed.state_dict()["state"].values(), before["state"].values(), strict=True):
        assert of.keys() == was.keys()
        assert all(torch.equal(of[key], was[key]) for key in of)
    for of in saved["state"].values():
        del of["anchor_digest"]
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.state[others[flipped]]["anchor"], saved["state"][flipped]["anchor"])


def test_tpgm_refuses_a_damaged_anchor_too():
    model = nn.Linear(5, 3)
    tpgm = rft.TPGM(model)
    saved = saved_and_loaded(tpgm.state_dict())
    saved["anchors"]["weight"][1, 1] += 1
    with pytest.raises(ValueError, match="the checkpoint's anchor of parameter 'weight' is damaged"):
        tpgm.load_state_dict(saved)
    del saved["anchor_digests"]
    tpgm.load_state_dict(saved)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_handed_out_is_a_copy(kind):
    params = make()
    optimizer = OPTIMIZERS[kind](params)
    was = copy.deepcopy(optimizer.state_dict()["state"])
    for of in optimizer.state_dict()["state"].values():
        of["anchor_digest"].zero_()
    assert optimizer.state  # which completes itself
    for of in optimizer.state.values():
        of["anchor_digest"].zero_()
    assert optimizer.state
    for p, of in zip(params, optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(of["anchor_digest"], optimizer.state[p]["anchor_digest"])
        assert torch.equal(of["anchor_digest"], digests.digest(of["anchor"]))
    assert all(torch.equal(of["anchor_digest"], was[key]["anchor_digest"]) for key, of in was.items())


def test_looking_does_not_void_the_plan():
    params = make()
    optimizer = rft.AdamSPD(params, lr=1e-2)
    run(optimizer, params, 1)
    assert optimizer.state
    run(optimizer, params, 1)
    plan = optimizer._plans.current
    optimizer.state_dict()
    assert optimizer.state
    run(optimizer, params, 1)
    assert optimizer._plans.current is plan
