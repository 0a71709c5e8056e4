"""Groups of parameters: which are in, which are frozen, and their names, for torch's optimizers and ours."""

import copy

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.finetune.param_groups import (
    bitfit,
    keep_requires_grad,
    layerwise_decay,
    linear_probe,
    partial_fusion,
)

OPTIMIZERS = (torch.optim.AdamW, torch.optim.SGD, rft.AnchoredAdamW, rft.AdamSPD)


class RootScale(nn.Module):
    """A norm of one's own, as language models have them."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(8), nn.SyncBatchNorm(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True),
                nn.LayerNorm(8), nn.RMSNorm(8), nn.BatchNorm2d(8, affine=False),
            ]
        )  # fmt: skip
        self.own = RootScale(8)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.recurrent = nn.LSTM(8, 8)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3))
        self.q_bias = nn.Parameter(torch.zeros(3))
        self.head_of_old = nn.Linear(8, 2)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))

    def forward(self, x):
        return self.head(self.norms[0](self.stem(x)).mean((2, 3)))


HEAD = ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]
BIASES = [
    "q_bias", "stem.bias", "norms.0.bias", "norms.1.bias", "norms.2.bias", "norms.3.bias", "norms.4.bias",
    "attention.in_proj_bias", "attention.bias_k", "attention.bias_v", "attention.out_proj.bias",
    "recurrent.bias_ih_l0", "recurrent.bias_hh_l0", "head_of_old.bias",
]  # fmt: skip
NORMS = [f"norms.{k}.{leaf}" for k in range(5) for leaf in ("weight", "bias")] + ["norms.5.weight"]
CHOICES = [
    (linear_probe, {}, []),
    (bitfit, {}, [BIASES]),
    (partial_fusion, {}, [NORMS]),
    (partial_fusion, {"norms": RootScale}, [NORMS + ["own.scale"]]),
    (partial_fusion, {"norms": [RootScale, nn.Conv2d]}, [["stem.weight", "stem.bias", *NORMS, "own.scale"]]),
]


def names_of(groups):
    return [[name for name, _ in group["params"]] for group in groups]


@pytest.mark.parametrize(("choose", "kwargs", "body"), CHOICES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_choices(choose, kwargs, body, optimizer):
    model = Net()
    model.head.requires_grad_(False)  # as an earlier choice may have left it
    groups = choose(model, "head", **kwargs)
    names = names_of(groups)
    assert names == [*body, HEAD]
    named = dict(model.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == {name for group in names for name in group}
    held = optimizer(groups, lr=0.1).param_groups
    assert [group["param_names"] for group in held] == names
    assert all(p is named[n] for g in held for p, n in zip(g["params"], g["param_names"], strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("choose", [linear_probe, bitfit, partial_fusion])
def test_only_the_chosen_move(choose, optimizer):
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = choose(model, model.head, head_options={"weight_decay": 0.0})
    names = {name for group in names_of(groups) for name in group}
    optimizer = optimizer(groups, lr=0.1, weight_decay=0.4)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved <= graded <= names
    assert set(HEAD) <= moved
    assert (choose is linear_probe) == (moved == set(HEAD))


def test_options_are_the_groups():
    model, options, head_options = Net(), {"lr": 0.2}, {"method": "none", "lr": 0.4}
    groups = partial_fusion(model, "head", options=options, head_options=head_options)
    optimizer = rft.AdamSPD(groups, lr=0.1, strength=2.0)
    assert [(g["lr"], g["method"], g["strength"]) for g in optimizer.param_groups] == [
        (0.2, "spd", 2.0), (0.4, "none", 2.0)
    ]  # fmt: skip
    groups[0]["lr"] = 7
    assert (options, head_options) == ({"lr": 0.2}, {"method": "none", "lr": 0.4})
    before = [p.requires_grad for p in model.parameters()]
    for refused in ({"params": []}, {"param_names": []}):
        for choose in (linear_probe, bitfit, partial_fusion):
            with pytest.raises(ValueError, match="options must not have 'param"):
                choose(model, "stem", head_options=refused)
    assert [p.requires_grad for p in model.parameters()] == before


def test_anchors_by_name():
    """The names are those of model.named_parameters(), so a pre-trained model's fit."""
    model = Net()
    pretrained = {name: p.detach() + 1 for name, p in model.named_parameters()}
    groups = bitfit(model, "head", head_options={"method": "none"})
    optimizer = rft.AdamSPD(groups, anchor={name: pretrained[name] for name in BIASES})
    for param, name in zip(optimizer.param_groups[0]["params"], BIASES, strict=True):
        assert torch.equal(optimizer.state[param]["anchor"], pretrained[name])
    with pytest.raises(ValueError, match=r"lacks 'stem\.bias'"):
        rft.AdamSPD(groups, anchor={n: pretrained[n] for n in BIASES if n != "stem.bias"})


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("head", HEAD),
        (lambda m: m.head, HEAD),
        (lambda m: m.head[1], HEAD[2:]),
        ("head.1", HEAD[2:]),
        ("head.1.bias", HEAD[3:]),
        (lambda m: ["q_bias", m.head[1]], ["q_bias"] + HEAD[2:]),
        (("head.1", "head"), HEAD),
        (lambda m: (part for part in ("head.0", "head.1")), HEAD),
    ],
)
def test_heads(head, expected):
    model = Net()
    assert names_of(linear_probe(model, head(model) if callable(head) else head)) == [expected]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports, at the first torch.compile
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))], ids=["dp", "compile", "both"]
)
def test_wrappers(wrap):
    model = Net()
    wrapped = wrap(model)
    prefix = next(iter(wrapped.named_parameters()))[0].removesuffix("relative_position_bias_table")
    assert prefix
    for head in ("head", prefix + "head", model.head):
        assert names_of(linear_probe(wrapped, head)) == [[prefix + name for name in HEAD]]
    assert names_of(linear_probe(model, prefix + "head")) == [HEAD]
    model.head = wrap(model.head)  # a part of the model is wrapped
    for head in ("head", "head.0", ["head.1.weight"]):
        assert linear_probe(model, head)


def test_a_module_of_ones_own_named_module():
    """Names that fit as they are come first."""
    model = nn.ModuleDict({"module": nn.ModuleDict({"head": nn.Linear(2, 2)}), "head": nn.Linear(2, 2)})
    assert names_of(linear_probe(model, "head")) == [["head.weight", "head.bias"]]
    assert names_of(linear_probe(model, "module.head")) == [["module.head.weight", "module.head.bias"]]


@pytest.mark.parametrize("choose", [linear_probe, bitfit, partial_fusion])
@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ("hea", ValueError, "head names 'hea', under which model has no parameter"),
        ("", ValueError, "head names ''"),
        (["head", "fc"], ValueError, "head names 'fc'"),
        ([], ValueError, "head is empty"),
        (nn.Linear(8, 2), ValueError, "this Linear is not part of model"),
        (nn.ReLU(), ValueError, "ReLU has no parameters"),
        (None, TypeError, "head is a NoneType"),
        ([nn.Parameter(torch.ones(1))], TypeError, "head has a Parameter"),
    ],
)
def test_heads_that_are_none(choose, head, error, message):
    model = Net()
    model.stem.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        choose(model, head)
    assert [p.requires_grad for p in model.parameters()] == before


def test_nothing_to_choose():
    bare = nn.ModuleDict({"body": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2)})
    quantized = copy.deepcopy(bare)
    quantized.head.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    for message, call in (
        ("no biases outside of head", lambda: bitfit(bare, "head")),
        (r"no norm layers.*norms=", lambda: partial_fusion(bare, "head")),
        ("norms has RootScale, of which model has no module", lambda: partial_fusion(bare, "head", norms=RootScale)),
        ("head is all of model", lambda: linear_probe(bare, bare)),
        ("head is all of model", lambda: bitfit(bare, ["body", "head"])),
        (r"parameter 'head\.weight' is torch\.int8", lambda: linear_probe(quantized, "head")),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert all(p.requires_grad for p in bare.parameters())
    assert quantized.body.weight.requires_grad


def test_tied_parameters_are_the_heads():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 7, bias=False)})
    model.head.weight = model.embed.weight
    assert names_of(linear_probe(model, "head")) == [["embed.weight"]]
    assert names_of(partial_fusion(model, "head")) == [["norm.weight", "norm.bias"], ["embed.weight"]]


def test_flags():
    model = Net()
    model.stem.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    groups = linear_probe(model, "stem", freeze=False)
    assert names_of(groups) == [["stem.weight", "stem.bias"]]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with keep_requires_grad(model):
        linear_probe(model, "head")
        assert not model.attention.in_proj_weight.requires_grad
        with pytest.raises(KeyboardInterrupt):
            interrupted(model)
        assert not model.stem.weight.requires_grad
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def interrupted(model):
    with keep_requires_grad(model):
        bitfit(model, "stem")
        assert model.stem.weight.requires_grad
        raise KeyboardInterrupt


LAYERS = [
    ("stem", "relative_position_bias_table", "q_bias"), ["norms", "own"], "attention", "recurrent",
    ["head_of_old", "head"],
]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_layerwise_decay(optimizer):
    model = Net()
    groups = layerwise_decay(model, 0.8, 0.5, LAYERS, options={"weight_decay": 0.1}, head_options={"weight_decay": 0.0})
    names = names_of(groups)
    held = optimizer(groups, lr=7.0).param_groups
    assert [group["param_names"] for group in held] == names
    assert [group["lr"] for group in held] == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert [group["weight_decay"] for group in held] == [0.1] * 4 + [0.0]
    assert held[0]["param_names"] == ["relative_position_bias_table", "q_bias", "stem.weight", "stem.bias"]
    named = dict(model.named_parameters())
    assert sorted(n for g in held for n in g["param_names"]) == sorted(named)
    assert all(p is named[n] for g in held for p, n in zip(g["params"], g["param_names"], strict=True))
    assert all(p.requires_grad for p in model.parameters())
    modules = [[model.stem, "relative_position_bias_table", "q_bias"], [model.norms, model.own], model.attention,
               model.recurrent, (model.head_of_old, model.head)]  # fmt: skip
    assert names_of(layerwise_decay(model, 0.8, 0.5, modules)) == names
    assert layerwise_decay(model, 0.8, 0.5, LAYERS, head_options={"lr": 3.0})[-1]["lr"] == 3.0


def test_layerwise_decay_scales_the_steps():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = torch.optim.SGD(layerwise_decay(model, 0.4, 0.5, [*model]))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for k, (p, was) in enumerate(zip(model.parameters(), before, strict=True)):
        torch.testing.assert_close(was - p, torch.full_like(p, 0.1 * 2 ** (k // 2)))


def test_layerwise_decay_of_a_frozen_part():
    model = Net()
    model.stem.requires_grad_(False)
    groups = layerwise_decay(model, 1.0, 0.5, [("relative_position_bias_table", "q_bias"), *LAYERS[1:]])
    assert not [name for names in names_of(groups) for name in names if name.startswith("stem")]
    with pytest.raises(ValueError, match=r"layers\[0\] has no parameter that requires a gradient"):
        layerwise_decay(model, 1.0, 0.5, ["stem", ("relative_position_bias_table", "q_bias"), *LAYERS[1:]])


def test_layerwise_decay_refuses():
    model, tied = Net(), nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7)})
    tied.head.weight = tied.embed.weight
    for message, layers in (
        (r"no layer has 'own\.scale', 'head\.0\.weight', 'head\.0\.bias'; add", [*LAYERS[:1], "norms", *LAYERS[2:4],
                                                                               ["head.1", "head_of_old"]]),
        (r"several layers have 'head_of_old\.weight' \(layers \[3, 5\]\), 'head_of_old\.bias'", [
            *LAYERS[:3], "head_of_old", *LAYERS[3:]]),
        (r"layers\[1\] names 'blocks'", ["stem", "blocks", "head"]),
        ("layers must be a sequence", "head"),
        ("layers must be a sequence", model.norms),
        ("layers must be a sequence", []),
        (r"layers\[0\] is empty", [[], "head"]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            layerwise_decay(model, 1.0, 0.5, layers)
    with pytest.raises(ValueError, match=r"several layers have 'embed\.weight' \(layers \[0, 1\]\).*tied"):
        layerwise_decay(tied, 1.0, 0.5, ["embed", "head"])
    for lr, decay, message in (
        (-1.0, 0.5, "lr must be"), (float("nan"), 0.5, "lr must be"), (float("inf"), 0.5, "lr must be"),
        (1.0, 0.0, "decay must be"), (1.0, 1.1, "decay must be"), (1.0, float("nan"), "decay must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            layerwise_decay(model, lr, decay, LAYERS)
    with pytest.raises(ValueError, match="options must not have 'lr'"):
        layerwise_decay(model, 1.0, 0.5, LAYERS, options={"lr": 1.0})
    with pytest.raises(TypeError, match=r"layers\[0\] is a int"):
        layerwise_decay(model, 1.0, 0.5, [3, "head"])


def test_linear_probing_then_fine_tuning():
    """The recipe: the head alone, then everything, held near the probed weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    inputs, targets = torch.randn(64, 8), torch.randint(2, (64,))
    start = copy.deepcopy(model.state_dict())

    def train(optimizer, steps):
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    with keep_requires_grad(model):
        probed = train(torch.optim.AdamW(linear_probe(model, "2"), lr=1e-2), 20)
    assert torch.equal(model[0].weight, start["0.weight"])
    assert not torch.equal(model[2].weight, start["2.weight"])
    optimizer = rft.AdamSPD(model.named_parameters(), lr=1e-2)
    assert torch.equal(optimizer.state[model[2].weight]["anchor"], model[2].weight)
    assert train(optimizer, 20) < probed
    assert not torch.equal(model[0].weight, start["0.weight"])
