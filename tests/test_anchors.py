"""What anchors are given as, in which dtype and where they are kept, what a checkpoint keeps."""

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.core import anchors
from tests.test_optimizers import SHAPES, make, run
from tests.test_state import copies, saved_and_loaded
from tests.test_steps import slow

NAMES = [f"w{i}" for i in range(6)]


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.torch")


def stored_as(dtype, params):
    """The weights of a checkpoint of `dtype`, loaded into wider parameters."""
    return [nn.Parameter(p.detach().to(dtype).to(p.dtype)) for p in params]


def test_anchor_kinds(backend):
    start = [p.detach().clone() for p in make()]
    results, steps = [], 2 if slow(backend) else 5
    names = [f"layer{i}.weight" for i in range(len(SHAPES))]
    for kwargs in (
        {},
        {"anchor": "initial"},
        {"anchor": [t.clone() for t in start]},
        {"anchor": tuple(nn.Parameter(t.clone()) for t in start)},
        {"anchor": {n: t.clone() for n, t in zip(reversed(names), reversed(start), strict=True)}},
    ):
        params = make()
        optimizer = rft.AdamSPD(zip(names, params, strict=True), lr=1e-2, backend=backend, **kwargs)
        run(optimizer, params, steps)
        results.append(params)
        assert all(torch.equal(optimizer.state[p]["anchor"], t) for p, t in zip(params, start, strict=True))
    for group_key in ({"pre": [t.clone() for t in start]}, {"anchor": [t.clone() for t in start]}):
        params = make()
        run(rft.AdamSPD([{"params": params, **group_key}], lr=1e-2, backend=backend), params, steps)
        results.append(params)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))

    zero = []
    for kwargs in ({"anchor": "zero"}, {"pre": None}, {"anchor": [torch.zeros_like(t) for t in start]}):
        params = make()
        optimizer = rft.AdamSPD([{"params": params, **kwargs}], lr=1e-2, backend=backend)
        run(optimizer, params, steps)
        zero.append(params)
        assert ("anchor" in optimizer.state[params[0]]) == isinstance(kwargs.get("anchor"), list)
    assert all(map(torch.equal, zero[1], zero[0]))
    assert all(map(torch.equal, zero[2], zero[0]))
    assert not all(map(torch.equal, zero[0], results[0]))


def test_shared_anchor_mapping_over_groups():
    body, head = make([(5, 7), (7,)]), make([(2, 7)])
    pretrained = {"a": body[0].detach().clone(), "b": body[1].detach().clone()}
    groups = [
        {"params": [("a", body[0]), ("b", body[1])]},
        {"params": [("head", head[0])], "method": "none"},
    ]
    optimizer = rft.AdamSPD(groups, anchor=pretrained)
    assert optimizer.state[body[0]]["anchor"].data_ptr() == pretrained["a"].data_ptr()
    assert head[0] not in optimizer.state
    with pytest.raises(ValueError, match="the anchor mapping lacks 'b'"):
        rft.AdamSPD(groups, anchor={"a": pretrained["a"]})


def around(params, anchor):
    return rft.Anchored(torch.optim.SGD(params), anchor=anchor)


def test_a_state_dict_is_an_anchor_mapping(tmp_path, safetensors):
    """With buffers, second names of tied weights, and what wrappers put into names, on either side; saved too."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(5, 4), nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.save_model(model, tmp_path / "model.safetensors")  # keeps one name of the tied weights
    wrapped = [(f"module._orig_mod.{name}", param) for name, param in model.named_parameters()]
    for names in (list(model.named_parameters()), wrapped):
        for anchor in (start, {f"_orig_mod.{name}": of for name, of in start.items()}, str(tmp_path)):
            for optimizer_of in (rft.AdamSPD, around):
                optimizer = optimizer_of(names, anchor=anchor)
                for name, param in model.named_parameters():
                    assert torch.equal(optimizer.state[param]["anchor"], start[name])
    first = rft.AdamSPD(model.named_parameters())
    rft.AdamSPD(wrapped).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"names differ, first 'embed\.weight' for '_orig_mod\.other\.weight'"):
        rft.AdamSPD([("_orig_mod.other.weight", model.embed.weight), *wrapped[1:]]).load_state_dict(first.state_dict())


@pytest.mark.parametrize("optimizer_of", [rft.AdamSPD, around])
def test_a_list_of_anchors_is_parallel_over_all_groups(optimizer_of):
    a, b, c = params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    anchors = [torch.zeros(3), torch.full((3,), 2.0)]
    groups = [{"params": [a]}, {"params": [b], "anchor": "zero"}, {"params": (p for p in (c,))}]
    optimizer = optimizer_of(groups, anchor=anchors)
    kept = [optimizer.state[p].get("anchor") for p in params]
    assert kept[1] is None
    assert kept[0].data_ptr() == anchors[0].data_ptr()
    assert kept[2].data_ptr() == anchors[1].data_ptr()
    with pytest.raises(ValueError, match="1 anchors for 2 parameters: a list of anchors is parallel"):
        optimizer_of([{"params": [a]}, {"params": [c]}], anchor=anchors[:1])


@pytest.mark.lean(keep=lambda wide, narrow, **_: wide == torch.float32 and narrow == torch.bfloat16)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["spd", "ftp", "l2sp"])
def test_exact_anchors_give_the_same_bits_in_less_memory(backend, narrow, wide, method):
    results = []
    for dtype in ("exact", None):
        params = stored_as(narrow, make(dtype=wide))
        optimizer = rft.AnchoredAdamW(params, lr=1e-2, method=method, anchor_dtype=dtype, backend=backend)
        kept = {optimizer.state[p]["anchor"].dtype for p in params}
        assert kept == ({narrow} if dtype else {wide})
        run(optimizer, params, 2 if slow(backend) else 4)
        results.append(params)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("values", "dtype", "kept"),
    [
        (1 + 2.0**-7, torch.float32, torch.bfloat16),
        (1 + 2.0**-10, torch.float32, torch.float16),
        (1 + 2.0**-11, torch.float32, torch.float32),
        (2.0**100, torch.float32, torch.bfloat16),  # beyond float16
        (1 + 2.0**-23, torch.float64, torch.float32),
        (1 + 2.0**-24, torch.float64, torch.float64),
        (float("nan"), torch.float32, torch.float32),  # nobody can say
        (1.0, torch.bfloat16, torch.bfloat16),
        (1.0, torch.float16, torch.float16),
    ],
)
def test_the_smallest_dtype_that_is_exact(values, dtype, kept):
    """Exact for all weights of the group. One that needs more decides for the rest, so that they share launches."""
    param = nn.Parameter(torch.full((7,), values, dtype=dtype))
    assert anchors.exact_dtypes([param, nn.Parameter(torch.zeros(3, dtype=dtype))]) == [kept, kept]


def test_an_anchor_dtype_rounds(backend):
    params = make()
    optimizer = rft.AdamSPD(params, anchor_dtype=torch.bfloat16, backend=backend)
    assert all(torch.equal(optimizer.state[p]["anchor"], p.bfloat16()) for p in params)
    given = rft.AdamSPD(params, anchor=[p.detach().clone() for p in params], anchor_dtype=torch.float16)
    assert {given.state[p]["anchor"].dtype for p in params} == {torch.float16}
    mixed = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = rft.AdamSPD(mixed, anchor_dtype=None)
    assert [optimizer.state[p]["anchor"].dtype for p in mixed] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"anchor_dtype": "float17"}, "anchor_dtype must be 'exact', None or a floating-point torch.dtype"),
        ({"anchor_dtype": torch.int8}, "anchor_dtype must be"),
        ({"anchor_device": "cuda"}, r"anchor_device must be None \(the parameters'\), 'cpu' or 'disk'"),
        ({"save_anchors": "hash"}, "save_anchors must be True, False or 'digest'"),
        ({"anchor": "weights.bin"}, "unknown anchor 'weights.bin'"),
        ({"state_dtype": torch.float16}, r"state_dtype must be torch.float32, torch.bfloat16 or '8bit'"),
        ({"state_dtype": "bf16"}, r"state_dtype must be .*, or its name, got 'bf16'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
    ],
)
def test_bad_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        rft.AdamSPD(make(), **kwargs)


def test_host_anchors_of_host_parameters_change_nothing(backend):
    results = []
    for device in (None, "cpu"):
        params = make()
        optimizer = rft.AdamSPD(params, lr=1e-2, anchor_device=device, backend=backend)
        run(optimizer, params, 3)
        other = rft.AdamSPD(copies(params), lr=1e-2, anchor_device=device, backend=backend)
        other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
        run(other, other.param_groups[0]["params"], 2, start=3)
        results.append(other.param_groups[0]["params"])
    assert all(map(torch.equal, *results))


def test_moving_a_state_does_not_double_given_anchors():
    """accelerate does this: it loads what it has just saved."""
    params, given = make(), [p.detach() for p in make()]
    optimizer = rft.AdamSPD(params, anchor=given)
    run(optimizer, params, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert [optimizer.state[p]["anchor"].data_ptr() for p in params] == [t.data_ptr() for t in given]
    saved, untouched = saved_and_loaded(optimizer.state_dict()), [t.clone() for t in given]
    optimizer.load_state_dict(saved)
    assert [optimizer.state[p]["anchor"].data_ptr() for p in params] == [t.data_ptr() for t in given]
    saved["state"][1]["anchor"] += 1
    del saved["state"][1]["anchor_digest"]
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[1]]["anchor"], given[1] + 1)
    for of in optimizer.state_dict()["state"].values():  # what is handed out may be written
        of["anchor"].fill_(3)
    assert all(map(torch.equal, given, untouched))
