"""WiSE-FT: the line between two sets of weights, its exact ends, what stays off it, and what is refused."""

import copy
import sys
import weakref

import pytest
import torch
from torch import nn

from robustft_kernels.finetune import pairing
from robustft_kernels.finetune.wise import wise_ft, wise_ft_, wise_sweep


class Net(nn.Module):
    """Weights, batch-norm statistics and their integer count, a buffer outside the state dict, and a frozen mask."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.seen = self.seen + 1  # binds a new buffer
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model.head.weight = model.embed.weight
    return model


def pair(make=Net):
    """A pre-trained net, and one whose weights, statistics and counts have moved from it."""
    torch.manual_seed(0)
    first = make()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for p in second.parameters():
            p += torch.randn_like(p)
    if make is Net:
        second(torch.randn(4, 3, 8, 8))
    return first, second


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)


def everything(model):
    """All values of a model, also those outside the state dict."""
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


ONES, BYTES = torch.ones(2), torch.ones(2, dtype=torch.int8)
PARAMETERS = ("conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias")


@pytest.mark.parametrize("alpha", [0, 0.0, 0.3, 0.5, 1 / 3, 1])
@pytest.mark.parametrize("buffers", ["finetuned", "interpolate", "pretrained"])
def test_line(alpha, buffers):
    first, second = pair()
    out = wise_ft(first, second, alpha, buffers=buffers)
    a, b = first.state_dict(), second.state_dict()
    assert list(out) == list(b)
    assert out._metadata == b._metadata
    taken = {"finetuned": 1.0, "pretrained": 0.0, "interpolate": alpha}[buffers]
    weights = dict.fromkeys(PARAMETERS, alpha) | dict.fromkeys(("norm.running_mean", "norm.running_var"), taken)
    for name, weight in weights.items():
        exact = (1 - weight) * a[name].double() + weight * b[name].double()
        bound = 2 * torch.finfo(torch.float32).eps * (a[name].abs() + b[name].abs()).double()
        assert ((out[name].double() - exact).abs() <= bound * (weight not in (0, 1))).all(), name
        assert out[name].stride() == b[name].stride()
        assert not torch.equal(a[name], b[name]), "the test would prove nothing"
    assert out["norm.num_batches_tracked"] == 1 != a["norm.num_batches_tracked"]
    assert torch.equal(out["mask"], b["mask"])  # infinite on both sides, and no NaN between
    second.load_state_dict(out)
    assert {t.data_ptr() for t in (*a.values(), *b.values())}.isdisjoint(t.data_ptr() for t in out.values())


DTYPES = [
    ("float32", "float32"), ("float64", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"),
    ("float32", "float16"), ("float16", "float64"), ("complex64", "complex64"), ("complex64", "complex128"),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "theirs"), DTYPES)
def test_dtypes(dtype, theirs):
    """Allows half a unit of the dtype, and three roundings of the arithmetic on the way. At the ends it is exact."""

    def parts(t):
        return (torch.view_as_real(t) if t.is_complex() else t).double()

    torch.manual_seed(1)
    dtype, theirs = getattr(torch, dtype), getattr(torch, theirs)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    start, end = torch.randn(1000, dtype=wide).to(theirs), torch.randn(1000, dtype=wide).to(dtype)
    exact = 0.7 * parts(start) + 0.3 * parts(end)
    arithmetic = torch.float64 if torch.float64 in (dtype.to_real(), theirs.to_real()) else torch.float32
    bound = torch.finfo(dtype).eps / 2 * exact.abs()
    bound += 4 * torch.finfo(arithmetic).eps * (parts(start).abs() + parts(end).abs())

    def at(alpha):
        return wise_ft({"w": start}, {"w": end}, alpha, buffers="interpolate")

    assert at(0.3)["w"].dtype == dtype
    assert ((parts(at(0.3)["w"]) - exact).abs() <= bound).all()
    if dtype.itemsize == 2:
        assert ((parts(0.7 * start.to(dtype) + 0.3 * end) - exact).abs() > bound).any()
    assert same_bits(at(0), {"w": start.to(dtype)})
    assert same_bits(at(1), {"w": end})


def test_ends_keep_odd_bits_and_the_middle_keeps_what_did_not_move():
    odd = torch.tensor([0x7FC01234, -0x80000000, 0x00000001, 0x7F800000], dtype=torch.int32).view(torch.float32)
    plain = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for alpha, first, second in ((0, odd, plain), (1, plain, odd)):
        assert same_bits(wise_ft({"w": first}, {"w": second}, alpha, buffers="interpolate"), {"w": odd})
    still = torch.cat([torch.randn(10_000), odd[1:]])
    assert same_bits(wise_ft({"w": still}, {"w": still.clone()}, 0.3, buffers="interpolate"), {"w": still})
    assert not torch.equal(0.7 * still + 0.3 * still, still), "the formula alone would do: this proves nothing"
    far = {"w": torch.tensor([3e38])}, {"w": torch.tensor([-3e38])}
    assert wise_ft(*far, 0.5, buffers="interpolate")["w"] == 0  # their difference is infinite in float32
    out = wise_ft({"w": plain}, {"w": odd, "_extra_state": (extra := [1, 2])}, 0.3, buffers="interpolate")
    assert out["_extra_state"] == extra is not out["_extra_state"]


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("buffers", ["finetuned", "interpolate", "pretrained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_equals_loading(alpha, buffers, dtype):
    first, second = pair()
    second.to(dtype)
    loaded = copy.deepcopy(second)
    loaded.load_state_dict(wise_ft(first, second, alpha, buffers=buffers))
    wise_ft_(second, first.state_dict(), alpha, buffers=buffers)
    assert same_bits(everything(second), everything(loaded))


def test_in_place_goes_tensor_by_tensor(monkeypatch):
    made, blend = [], pairing.blend

    def counted(*args):
        assert sum(ref() is not None for ref in made) <= 1
        made.append(weakref.ref(out := blend(*args)))
        return out

    monkeypatch.setattr(pairing, "blend", counted)
    first, second = pair()
    wise_ft_(second, first, 0.3)
    assert len(made) == len(PARAMETERS)


@pytest.mark.parametrize("buffers", ["finetuned", "pretrained"])
def test_what_a_state_dict_does_not_tell(buffers):
    first, second = pair()
    a, b = first.state_dict(), second.state_dict()
    expected = wise_ft(first, second, 0.3, buffers=buffers)
    with pytest.raises(ValueError, match=r"'mask', 'conv\.weight'.*parameters or buffers.*parameters="):
        wise_ft(a, b, 0.3, buffers=buffers)
    assert same_bits(expected, wise_ft(first, b, 0.3, buffers=buffers))
    assert same_bits(expected, wise_ft(a, second, 0.3, buffers=buffers))
    assert same_bits(expected, wise_ft(a, b, 0.3, buffers=buffers, parameters=["_orig_mod." + n for n in PARAMETERS]))
    only = wise_ft(dict(first.named_parameters()), dict(second.named_parameters()), 0.3, buffers=buffers)
    assert same_bits(only, {name: expected[name] for name in PARAMETERS})
    with pytest.raises(ValueError, match=r"'conv\.wait'"):
        wise_ft(a, b, 0.3, parameters=["conv.wait"])
    with pytest.raises(TypeError, match="collection"):
        wise_ft(a, b, 0.3, parameters="conv.weight")
    some = wise_ft(a, b, 0.3, parameters=["conv.weight"])  # the rest are buffers then
    assert [name for name in PARAMETERS if not torch.equal(some[name], b[name])] == ["conv.weight"]


def test_a_state_dict_of_copies_is_not_taken_for_buffers():
    class Copying(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars=False)

    first, second = pair(lambda: Copying(2, 2))
    with pytest.raises(ValueError, match="nothing tells whether 'weight', 'bias'"):
        wise_ft(first, second, 0.3)
    with pytest.raises(ValueError, match=r"model's state_dict\(\) holds copies of 'weight', 'bias'"):
        wise_ft_(second, first, 0.3, buffers="interpolate")


FSDP = "_fsdp_wrapped_module."
WRAPS = {
    "dp": nn.DataParallel,
    "compile": torch.compile,
    "dp-compile": lambda m: nn.DataParallel(torch.compile(m)),
    "compile-dp-dp": lambda m: torch.compile(nn.DataParallel(nn.DataParallel(m))),
    "fsdp": lambda m: {FSDP + n.replace(".", "." + FSDP): t for n, t in m.state_dict().items()},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports, at the first torch.compile
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("side", [0, 1])
def test_wrappers(wrap, side):
    models = list(pair())
    expected = wise_ft(*models, 0.3)
    models[side] = WRAPS[wrap](models[side])
    given = models[1] if isinstance(models[1], dict) else models[1].state_dict()
    out = wise_ft(*models, 0.3, exclude="head")
    assert list(out) == list(given)
    for short, name in zip(expected, given, strict=True):
        assert torch.equal(out[name], given[name] if short.startswith("head") else expected[short]), short


HEADS = [  # the names of θ₀'s head weight, its classes, and what is said
    (None, 3, r"^pretrained lacks 'head\.weight'\. exclude="),
    ("head.weight", 10, r"^'head\.weight' is float32 \(3, 8\) in model, float32 \(10, 8\) in pretrained\. exclude="),
    ("fc.weight", 3, r"^pretrained lacks 'head\.weight'; model lacks 'fc\.weight', which pretrained has\. exclude="),
]


@pytest.mark.parametrize(("name", "classes", "message"), HEADS)
def test_fresh_head(name, classes, message):
    first, second = pair()
    start = {n: t for n, t in first.state_dict().items() if n != "head.weight"}
    if name:
        start[name] = torch.ones(classes, 8)
    before = everything(second)
    with pytest.raises(ValueError, match=message):
        wise_ft_(second, start, 0.3)
    with pytest.raises(ValueError, match=message.replace("model", "finetuned")):
        wise_ft(start, second, 0.3)
    assert same_bits(everything(second), before)
    exclude = ["head.weight", name or "head.weight"]
    expected = {**wise_ft(first, second, 0.3), "head.weight": second.head.weight.detach().clone()}
    assert same_bits(wise_ft(start, second, 0.3, exclude=exclude), expected)
    wise_ft_(second, start, 0.3, exclude=exclude)
    assert same_bits(second.state_dict(), expected)


def test_tied():
    first, second = pair(tied)
    expected = wise_ft(first, second, 0.3)
    assert expected["head.weight"] is expected["embed.weight"]
    start, end = ({"embed.weight": model.embed.weight} for model in (first, second))  # one of its two names
    assert same_bits(wise_ft(start, second, 0.3), expected)
    assert torch.equal(wise_ft(first, end, 0.3)["embed.weight"], expected["embed.weight"])
    copies = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert same_bits(wise_ft(copies, second, 0.3), expected)
    with pytest.raises(ValueError, match=r"ties 'embed\.weight', 'head\.weight', which differ in pretrained"):
        wise_ft({**copies, "head.weight": copies["head.weight"] + 1}, second, 0.3)
    with pytest.raises(ValueError, match=r"ties 'embed\.weight', 'head\.weight': exclude all of them, or none"):
        wise_ft(first, second, 0.3, exclude="head")
    wise_ft_(second, copies, 0.3)  # once, and not once for each name
    assert same_bits(second.state_dict(), expected)
    assert second.head.weight is second.embed.weight
    second.head.weight = nn.Parameter(second.head.weight.detach() + 1)  # from here on the two are apart
    out = wise_ft(first, second, 0.5)
    torch.testing.assert_close(out["head.weight"] - out["embed.weight"], torch.full((7, 4), 0.5))


def all_three(first, second, alpha):
    yield lambda: wise_ft(first, second, alpha)
    yield lambda: wise_ft_(second, first, alpha)
    yield lambda: wise_sweep(second, first, lambda model: pytest.fail("evaluated"), (0.5, alpha))


@pytest.mark.parametrize("alpha", [-0.1, 1.0001, float("nan"), float("inf")])
def test_alpha_out_of_range(alpha):
    for call in all_three(*pair(), alpha):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            call()


REFUSED = [
    (TypeError, "pretrained is a list", [ONES], {"w": ONES}),
    (ValueError, "the path of a safetensors file", "weights.pt", {"w": ONES}),
    (TypeError, "finetuned is a list", {"w": ONES}, [ONES]),
    (ValueError, "pretrained holds no tensors", {"state_dict": {"w": ONES}}, {"w": ONES}),
    (ValueError, "sparse tensors: 'w'", {"w": ONES}, {"w": torch.eye(2).to_sparse()}),
    (ValueError, r"'w' is float32 \(2,\) in finetuned, int8 \(2,\) in pretrained", {"w": BYTES}, {"w": ONES}),
    (ValueError, r"wrapper's prefix alone: 'w', '_orig_mod\.w'", {"w": ONES, "_orig_mod.w": ONES}, {"w": ONES}),
    (ValueError, r"lacks 'w1', .*'w10' and 19 more\. exclude=", {"w0": ONES}, {f"w{k}": ONES + k for k in range(30)}),
]


@pytest.mark.parametrize(("error", "message", "pretrained", "finetuned"), REFUSED)
def test_refused(error, message, pretrained, finetuned):
    with pytest.raises(error, match=message):
        wise_ft(pretrained, finetuned, 0.3, buffers="interpolate")


def test_refused_arguments():
    for name in ("hea", "head.weigh", "", "fc"):
        with pytest.raises(ValueError, match=f"exclude names {name!r}"):
            wise_ft(*pair(), 0.3, exclude=name)
    with pytest.raises(ValueError, match="buffers must be"):
        wise_ft(*pair(), 0.3, buffers="both")
    with pytest.raises(TypeError, match="model is a dict"):
        wise_ft_({"w": ONES}, {"w": ONES}, 0.3)


def test_the_start_that_moved_along():
    """The state dict of a model is the model's memory. If it is kept without a copy, it is fine-tuned too."""
    _, model = pair()
    start = model.state_dict()
    with torch.no_grad():
        model.conv.weight += 1
    for call in all_three(start, model, 0.3):
        with pytest.raises(ValueError, match="moved along"):
            call()
    first, second = pair()
    second.conv = first.conv  # a part that both share, such as a frozen tower, is fine
    assert torch.equal(wise_ft(first, second, 0.3)["conv.weight"], first.conv.weight)


def sweep_probe(model):
    """An evaluation that changes the mode, statistics, even weights, and binds a new buffer."""
    values = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    model.train()
    model(torch.randn(4, 3, 8, 8))
    model.eval()
    with torch.no_grad():
        model.head.bias.fill_(7)
    return values, modes


@pytest.mark.parametrize("buffers", ["finetuned", "interpolate"])
def test_sweep(buffers, capsys):
    first, second = pair()
    second.norm.eval()
    before, modes = everything(second), [m.training for m in second.modules()]
    where = [*map(id, (*second.parameters(), *second.buffers()))]
    results = wise_sweep(second, first, sweep_probe, buffers=buffers)
    assert list(results) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    for alpha, (values, modes_then) in results.items():
        assert same_bits(values, wise_ft(first, second, alpha, buffers=buffers)), alpha
        assert modes_then == modes
    assert same_bits(everything(second), before)
    assert [m.training for m in second.modules()] == modes
    assert [*map(id, (*second.parameters(), *second.buffers()))] == where
    assert "11/11" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_sweep_interrupted(error):
    first, second = pair()
    before = everything(second)

    def evaluate(model):
        sweep_probe(model)
        model.half()  # other dtypes, in the very same parameters
        raise error("enough")

    with pytest.raises(error, match="enough"):
        wise_sweep(second, first, evaluate, (0.5, 0.7), progress=False)
    assert same_bits(everything(second), before)
    assert all(module.training for module in second.modules())


def test_sweep_without_tqdm(monkeypatch, capsys):
    first, second = pair()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert wise_sweep(second, first, lambda m: 1, (0, 1)) == {0: 1, 1: 1}
    monkeypatch.undo()
    assert wise_sweep(second, first, lambda m: 1, (0, 1), progress=False) == {0: 1, 1: 1}
    assert capsys.readouterr().err == ""
    for alphas in ((), (0.5, 0.5), (0, False)):
        with pytest.raises(ValueError, match="one or more different numbers"):
            wise_sweep(second, first, lambda m: pytest.fail("evaluated"), alphas)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
def test_fully_sharded(mesh_of_one):
    """FSDP swaps what its modules hold at every forward, and each evaluation must see the weights of its alpha."""
    from torch.distributed.fsdp import fully_shard

    first, second = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(2))
    x = torch.randn(3, 4)
    expected = wise_sweep(second, first, lambda model: model(x).detach(), (0, 0.3, 1), progress=False)
    sharded = [fully_shard(copy.deepcopy(model), mesh=mesh_of_one) for model in (first, second)]
    sharded[1](x)
    seen = wise_sweep(sharded[1], sharded[0], lambda model: model(x).detach(), (0, 0.3, 1), progress=False)
    assert all(torch.equal(seen[alpha], expected[alpha]) for alpha in expected)
    assert torch.equal(sharded[1][0].weight.full_tensor(), second[0].weight)
    with pytest.raises(ValueError, match=r"'0\.weight' is sharded float32 \(4, 4\) in model, float32 \(4, 4\) in pre"):
        wise_ft_(sharded[1], first, 0.3)
    whole, out = wise_ft(first, second, 0.3), wise_ft(*sharded, 0.3)
    wise_ft_(sharded[1], sharded[0], 0.3)
    for weights in (out, sharded[1].state_dict()):
        assert all(torch.equal(weights[n].full_tensor(), whole[n]) for n in ("0.weight", "1.bias", "2.bias"))
