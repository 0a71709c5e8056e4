"""Uniform soups and Model Stock: the formula in float64, what stays, what is matched, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.finetune import soups
from tests.test_wise import PARAMETERS, Net, same_bits, tied


def models(count, make=Net, shared=0.7):
    """A pre-trained net, and some that moved from it partly in one direction."""
    torch.manual_seed(0)
    base = make()
    way = [torch.randn_like(p) for p in base.parameters()]
    found = []
    for _ in range(count):
        net = copy.deepcopy(base)
        with torch.no_grad():
            for p, one in zip(net.parameters(), way, strict=True):
                p += shared * one + (1 - shared) * torch.randn_like(p)
        if make is Net:
            net(torch.randn(4, 3, 8, 8))
        found.append(net)
    return base, found


def exact_ratio(theta_0, thetas):
    """t as the paper has it, in float64, with the mean of all cosines for more than two models."""
    deltas = [(theta.double() - theta_0.double()).flatten() for theta in thetas]
    n = len(deltas)
    cosines = [deltas[i] @ deltas[j] / (deltas[i].norm() * deltas[j].norm()) for i in range(n) for j in range(i)]
    cos = sum(cosines) / len(cosines)
    return float(n * cos / (1 + (n - 1) * cos)) if cos > 0 else 0.0


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("buffers", ["finetuned", "interpolate"])
def test_soup_is_the_mean(count, buffers):
    _, found = models(count)
    states = [net.state_dict() for net in found]
    out = rft.soup(found, buffers=buffers)
    assert list(out) == list(states[0])
    assert out._metadata == states[0]._metadata
    for name in (*PARAMETERS, "norm.running_mean", "norm.running_var"):
        if "running" in name and buffers == "finetuned":
            assert torch.equal(out[name], states[0][name])
            continue
        mean = sum(state[name].double() for state in states) / count
        bound = count * torch.finfo(torch.float32).eps * sum(state[name].abs() for state in states)
        assert ((out[name].double() - mean).abs() <= bound).all(), name
        assert out[name].stride() == states[0][name].stride()
        assert not torch.equal(states[0][name], states[1][name]), "the test would prove nothing"
    assert torch.equal(out["mask"], states[0]["mask"])  # infinite in all
    found[0].load_state_dict(out)
    owned = {t.data_ptr() for state in states for t in state.values()}
    assert owned.isdisjoint(t.data_ptr() for t in out.values())


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("piece", [50, 2**20])
def test_stock_is_the_formula(count, piece, monkeypatch):
    monkeypatch.setattr(soups, "PIECE", piece)
    base, found = models(count)
    theta_0, thetas = base.state_dict(), [net.state_dict() for net in found]
    ratios = rft.stock_ratios(base, found)
    assert list(ratios) == list(PARAMETERS)
    out = rft.model_stock(base, found)
    for name, t in ratios.items():
        here = [state[name] for state in thetas]
        assert t == pytest.approx(exact_ratio(theta_0[name], here), abs=1e-6)
        assert 0 < t < 1
        exact = t * sum(theta.double() for theta in here) / count + (1 - t) * theta_0[name].double()
        torch.testing.assert_close(out[name].double(), exact, rtol=1e-6, atol=1e-6)
        assert out[name].stride() == here[0].stride()
    for name in out.keys() - ratios.keys():
        assert torch.equal(out[name], thetas[0][name])
    found[0].load_state_dict(out)


def test_each_tensor_has_its_own_ratio_and_pairs_are_averaged():
    """By hand: angles of 60° between two, then of 60°, 60° and 0° between three."""
    base = {"w": torch.zeros(2), "b": torch.zeros(2)}
    third = torch.tensor([0.5, math.sqrt(0.75)])
    one, two = ({"w": w, "b": torch.tensor([1.0, 0.0])} for w in (torch.tensor([2.0, 0.0]), third))
    assert rft.stock_ratios(base, [one, two], buffers="interpolate") == pytest.approx({"w": 2 / 3, "b": 1})
    found = rft.model_stock(base, [one, two], buffers="interpolate")
    torch.testing.assert_close(found["w"], 2 / 3 * (one["w"] + third) / 2)
    assert torch.equal(found["b"], one["b"])
    more = {name: theta.clone() for name, theta in two.items()}
    cos = (0.5 + 0.5 + 1) / 3
    ratios = rft.stock_ratios(base, [one, two, more], buffers="interpolate")
    assert ratios["w"] == pytest.approx(3 * cos / (1 + 2 * cos))


def test_which_bound_and_what_did_not_move():
    """Obtuse angles would go beyond θ₀, and to infinity at −1/(N − 1). One model that did not move has no angle."""
    odd = torch.tensor([0.1, float("inf"), -0.0, 1e-45])
    one, start = torch.tensor([1.0, 0.0]), torch.tensor([0.3, 0.7])
    for moves in ([one, -one], [one, torch.tensor([-0.5, 0.8])], [one, torch.zeros(2)], [one, one.flip(0)]):
        theta_0 = {"w": start, "still": odd}
        given = [{"w": start + move, "still": odd.clone()} for move in moves]
        ratios = rft.stock_ratios(theta_0, given, buffers="interpolate")
        assert ratios["w"] == 0
        assert math.isnan(ratios["still"])
        assert same_bits(rft.model_stock(theta_0, given, buffers="interpolate"), theta_0)
    theta_0, moves = torch.cat([start, odd]), (torch.tensor([1.0, 0.0, 0, 0, 0, 0]), torch.tensor([1.0, 1, 0, 0, 0, 0]))
    given = [{"w": theta_0 + move} for move in moves]  # what moved, and what is infinite on all sides, in one tensor
    out = rft.model_stock({"w": theta_0}, given, buffers="interpolate")["w"]
    assert rft.stock_ratios({"w": theta_0}, given, buffers="interpolate")["w"] == pytest.approx(2 / (1 + math.sqrt(2)))
    assert torch.equal(out[2:], theta_0[2:])


def test_soup_keeps_what_is_equal():
    still = torch.randn(10_000)
    given = [{"w": torch.cat([still, torch.tensor([float(k)])])} for k in range(3)]
    assert torch.equal(rft.soup(given, buffers="interpolate")["w"][:-1], still)
    assert not torch.equal((still + still + still) / 3, still), "the formula alone would do: this proves nothing"


DTYPES = [
    ("bfloat16",) * 3, ("float16", "float32", "bfloat16"), ("float32", "float64", "float32"),
    ("float32", "float32", "float64"), ("float64",) * 3, ("complex64",) * 3,
]  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes):
    """Rounded once: within half a unit of the first model's dtype, and a few roundings of the arithmetic."""

    def parts(t):
        return (torch.view_as_real(t) if t.is_complex() else t).double()

    torch.manual_seed(1)
    dtype, other, theirs = (getattr(torch, name) for name in dtypes)
    base = torch.randn(1000, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(theirs)
    way = torch.randn_like(base)
    thetas = [(base + way + torch.randn_like(base)).to(of) for of in (dtype, other)]
    given = [{"w": theta} for theta in thetas]
    mean = (parts(thetas[0]) + parts(thetas[1])) / 2
    t = rft.stock_ratios({"w": base}, given, buffers="interpolate")["w"]
    assert t == pytest.approx(exact_ratio(parts(base), list(map(parts, thetas))), abs=1e-6)
    arithmetic = torch.float64 if torch.float64 in (dtype, other, theirs) else torch.float32
    sizes = parts(base).abs() + sum(parts(theta).abs() for theta in thetas)
    for out, exact in (
        (rft.soup(given, buffers="interpolate")["w"], mean),
        (rft.model_stock({"w": base}, given, buffers="interpolate")["w"], t * mean + (1 - t) * parts(base)),
    ):
        assert out.dtype == dtype
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 4 * torch.finfo(arithmetic).eps * sizes
        assert ((parts(out) - exact).abs() <= bound).all()


@pytest.mark.parametrize("buffers", ["finetuned", "interpolate", "pretrained"])
def test_buffers(buffers):
    base, found = models(2)
    theta_0, thetas = base.state_dict(), [net.state_dict() for net in found]
    out = rft.model_stock(base, found, buffers=buffers)
    statistics = [name for name in theta_0 if "running" in name]
    ratios = rft.stock_ratios(base, found, buffers=buffers)
    for name in statistics:
        if buffers == "interpolate":
            t = ratios[name]
            expected = t * (thetas[0][name] + thetas[1][name]) / 2 + (1 - t) * theta_0[name]
            torch.testing.assert_close(out[name], expected)
        else:
            assert name not in ratios
            assert torch.equal(out[name], {"finetuned": thetas[0], "pretrained": theta_0}[buffers][name])
    assert out["norm.num_batches_tracked"] == 1 != theta_0["norm.num_batches_tracked"]
    with pytest.raises(ValueError, match="nothing tells whether 'mask'"):
        rft.soup(thetas)
    assert same_bits(rft.soup(thetas, parameters=PARAMETERS), rft.soup(found))
    assert same_bits(rft.soup([found[0], thetas[1]]), rft.soup(found))


def test_fresh_heads_wrappers_and_prefixes():
    base, found = models(3)
    expected = rft.model_stock(base, found, exclude="head")
    assert torch.equal(expected["head.weight"], found[0].head.weight)
    bare = {name: value for name, value in base.state_dict().items() if "head" not in name}
    other = nn.ModuleDict({"bert": found[1]})
    other["bert"].head = nn.Linear(8, 5)  # of another shape
    given = [found[0], nn.DataParallel(other), {f"module.{n}": t for n, t in found[2].state_dict().items()}]
    given[2]["module.extra"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"^finetuned\[0\] lacks 'module\.extra', which finetuned\[2\] has"):
        rft.model_stock(bare, given, exclude=["head", "bert.head"])
    out = rft.model_stock(bare, given, exclude=["head", "bert.head", "extra"])
    assert same_bits(out, expected)
    soup = rft.soup(given, exclude=["head", "bert.head", "extra"])
    assert same_bits(soup, rft.soup(models(3)[1], exclude="head"))


def test_models_from_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    states = [{"w": torch.randn(4, 3)} for _ in range(3)]
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for state, path in zip(states, paths, strict=True):
        safetensors.save_file(state, path)
    given = dict(buffers="interpolate")
    assert same_bits(rft.model_stock(*_split(paths), **given), rft.model_stock(*_split(states), **given))
    assert same_bits(rft.soup(iter(paths), **given), rft.soup(states, **given))


def _split(sides):
    return sides[0], sides[1:]


def test_tied_and_not_tensors():
    base, found = models(2, tied)
    out = rft.model_stock(base, found)
    assert out["head.weight"] is out["embed.weight"]
    assert list(rft.stock_ratios(base, found)) == ["embed.weight"]
    states = [dict(net.state_dict()) | {"_extra_state": [k]} for k, net in enumerate(found)]
    assert rft.soup(states, buffers="interpolate")["_extra_state"] == [0]


ONES, TWOS, LONG = ({"w": torch.full((size,), value)} for size, value in ((2, 1.0), (2, 2.0), (3, 1.0)))
REFUSED = [
    (ValueError, "two or more models, got 1", [ONES]),
    (ValueError, "two or more models, got 0", []),
    (TypeError, r"one model \(dict\)", ONES),
    (TypeError, r"one model \(Linear\)", nn.Linear(1, 1)),
    (TypeError, r"one model \(str\)", "model.safetensors"),
    (TypeError, r"finetuned\[1\] is a list", [ONES, [torch.ones(2)]]),
    (ValueError, r"finetuned\[1\] is the memory of finetuned\[0\], and moved along with it: copy", [ONES, ONES]),
    (ValueError, r"finetuned\[2\] is the memory of finetuned\[0\]", [ONES, TWOS, ONES]),
    (ValueError, r"^finetuned\[1\] lacks 'w'; finetuned\[0\] lacks 'v', which finetuned", [ONES, {"v": TWOS["w"]}]),
    (ValueError, r"'w' is float32 \(2,\) in finetuned\[0\], float32 \(3,\) in finetuned\[2\]", [ONES, TWOS, LONG]),
    (ValueError, r"finetuned\[1\] holds no tensors", [ONES, {"state_dict": ONES}]),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "given"), REFUSED)
def test_refused(error, message, given):
    theta_0 = {"w": torch.zeros(2)}
    for call in (rft.soup, lambda *of, **how: rft.model_stock(theta_0, *of, **how)):
        with pytest.raises(error, match=message):
            call(given, buffers="interpolate")


def test_refused_arguments():
    base, found = models(2)
    with pytest.raises(ValueError, match="buffers must be 'finetuned' or 'interpolate', got 'pretrained'"):
        rft.soup(found, buffers="pretrained")
    with pytest.raises(ValueError, match="buffers must be 'finetuned' or 'interpolate' or 'pretrained', got 'mean'"):
        rft.model_stock(base, found, buffers="mean")
    with pytest.raises(ValueError, match=r"exclude names 'hea', which neither finetuned\[0\], finetuned\[1\] nor pre"):
        rft.model_stock(base, found, exclude="hea")
    with pytest.raises(ValueError, match="pretrained is the memory of finetuned\\[1\\], and moved along"):
        rft.model_stock(found[1].state_dict(), found, buffers="interpolate")
    with torch.no_grad():
        found[1].head.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"'head\.bias' has no angles"):
        rft.model_stock(base, found)
    assert rft.soup(found)["head.bias"].isnan().sum() == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
def test_fully_sharded(mesh_of_one):
    """The same bits from sharded models as from whole ones."""
    from torch.distributed.fsdp import fully_shard

    base, found = models(2, lambda: nn.Linear(5, 4))
    whole, mixed = rft.model_stock(base, found), rft.soup(found)
    for net in (base, *found):
        fully_shard(net, mesh=mesh_of_one)
    out, soup = rft.model_stock(base, found), rft.soup(found)
    for name in ("weight", "bias"):
        assert torch.equal(out[name].full_tensor(), whole[name])
        assert torch.equal(soup[name].full_tensor(), mixed[name])
