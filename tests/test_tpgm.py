"""TPGM: its slopes and steps against plain torch, its readings of f_proj, checkpoints, names and refusals."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call

from robustft_kernels.finetune.projection import NORMS, deviation
from robustft_kernels.finetune.tpgm import TPGM
from tests.no_reads import NoReads
from tests.plain_projection import norms_of, oracle

F = nn.functional


class Net(nn.Module):
    """A convolution, a batch-norm, dropout, and two layers that share a weight. The loss does not see one parameter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.blocks[2].weight = self.blocks[0].weight
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.drop(torch.tanh(block(x)))
        return self.head(x)


def fine_tuned(seed=0, dtype=torch.float64, scale=0.2):
    """A net, its pre-trained state, and batches."""
    torch.manual_seed(seed)
    model = Net().to(dtype)
    model.stem[1].running_mean.normal_()
    pretrained = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn_like(p)
    batches = [(torch.randn(8, 1, 4, 4, dtype=dtype), torch.randint(0, 3, (8,))) for _ in range(3)]
    return model, pretrained, batches


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def anchors_for(tpgm, pretrained):
    return [pretrained[name].double() for name in tpgm.names]


def plain_objective(model, pretrained, batch, gamma, names, norm, mu=0.0, tv=0.0, groups=()):
    """The loss at the projected weights and the penalties, all by autograd."""
    own = dict(model.named_parameters())
    projected = {n: oracle(own[n].detach(), pretrained[n], g, norm) for n, g in zip(names, gamma, strict=True)}
    model.eval()
    loss = F.cross_entropy(functional_call(model, projected, (batch[0],)), batch[1]) + mu * gamma.square().sum()
    alphas = {}
    for name, g in zip(names, gamma, strict=True):
        n = norms_of(own[name].detach() - pretrained[name], norm)
        alphas[name] = torch.where(g < n, g / n, 1).mean()
    for group in groups:
        loss = loss + tv * sum((alphas[a] - alphas[b]).abs() for a, b in itertools.pairwise(group))
    return loss


def first_slopes(tpgm):
    """Adam's first moment after one step is a tenth of the gradient."""
    return tpgm.state_dict()["adam"]["state"][0]["exp_avg"] * 10


GROUPS = [["blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias"], ["stem.1.weight", "stem.1.bias"]]


@pytest.mark.parametrize("penalties", [{}, {"radius_penalty": 0.03}, {"tv": 0.1}], ids=["loss", "TPGM-C", "TV"])
@pytest.mark.parametrize("norm", NORMS)
def test_slopes_against_autograd(norm, penalties):
    model, pretrained, batches = fine_tuned()
    groups = [["blocks.0", "blocks.1"], "stem.1"]
    tpgm = TPGM(model, norm=norm, anchor=pretrained, init=0.7, groups=groups, **penalties)
    tpgm.update(loss_of(model), batches)
    gamma = torch.full((len(tpgm.names),), 0.7, dtype=torch.float64, requires_grad=True)
    mu, tv = penalties.get("radius_penalty", 0.0), penalties.get("tv", 0.0)
    plain_objective(model, pretrained, batches[0], gamma, tpgm.names, norm, mu, tv, GROUPS).backward()
    torch.testing.assert_close(first_slopes(tpgm), gamma.grad, rtol=1e-9, atol=1e-15)
    n = [norms_of(p.detach() - pretrained[name], norm) for name, p in model.named_parameters()]
    bound = sum(bool((k > 0.7).any()) for k in n)
    assert 3 < bound < len(n)  # both sides of the constraint are seen
    assert bool(gamma.grad.count_nonzero() > 3)


OPTIONS = [
    dict(norm="l2", init=0.3),
    dict(norm="mars", init="half_min"),
    dict(norm="mars_rows", init="half_min", clamp=True),
    dict(norm="l2", init=5.0, clamp=True, lr=0.3),
    dict(norm="mars_rows", init=0.4, radius_penalty=0.01, tv=0.02, groups=["blocks"]),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o['norm']}-{o['init']}")
def test_update_equals_a_loop_in_plain_torch(options):
    model, pretrained, batches = fine_tuned()
    tpgm = TPGM(model, anchor=pretrained, **options)
    norm, lr, clamp = options["norm"], options.get("lr", 1e-2), options.get("clamp")
    n = [norms_of(dict(model.named_parameters())[name].detach() - pretrained[name], norm) for name in tpgm.names]
    largest = torch.stack([k.max() for k in n])
    half = options["init"] == "half_min"
    gamma = torch.stack([k.min() / 2 if half else torch.tensor(options["init"]).double() for k in n])
    adam = torch.optim.Adam([gamma.requires_grad_()], lr=lr)
    group = ["blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias", "blocks.2.bias"]
    mu, tv = options.get("radius_penalty", 0.0), options.get("tv", 0.0)
    for step in range(7):
        with torch.no_grad():
            gamma.copy_(torch.minimum(gamma, largest) if clamp else gamma).clamp_(min=1e-8)
        adam.zero_grad()
        plain_objective(model, pretrained, batches[step % 3], gamma, tpgm.names, norm, mu, tv, [group]).backward()
        adam.step()
    with torch.no_grad():
        gamma.copy_(torch.minimum(gamma, largest) if clamp else gamma).clamp_(min=1e-8)
    tpgm.update(loss_of(model), batches, steps=4)
    tpgm.update(loss_of(model), batches, steps=3)  # goes on with the batches from its last place
    radii = torch.stack(list(tpgm.radii.values()))
    torch.testing.assert_close(radii, gamma.detach(), rtol=1e-7, atol=1e-12)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with NoReads():
        tpgm.project_()
    for name, p in model.named_parameters():
        expected = oracle(before[name], pretrained[name], tpgm.radii[name], norm)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)
        alpha = torch.where(
            tpgm.radii[name] < n[tpgm.names.index(name)], tpgm.radii[name] / n[tpgm.names.index(name)], 1
        )
        torch.testing.assert_close(tpgm.alphas[name], alpha.reshape(tpgm.alphas[name].shape))
        assert tpgm.radii[name].dim() == 0


def test_half_min_is_taken_once():
    weight = nn.Parameter(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
    tpgm = TPGM([("w", weight)], anchor="zero", norm="mars_rows", init="half_min")
    assert bool(tpgm.radii["w"].isnan())
    assert tpgm.alphas == {}
    for alphas in ([0.25, 0.5], [1.0, 1.0]):
        tpgm.project_()
        assert tpgm.radii["w"] == 1
        assert tpgm.alphas["w"].tolist() == alphas
    assert torch.equal(weight.detach(), torch.tensor([[0.75, 0.25], [0.0, 1.0]]))
    tpgm.update(lambda _: 0 * weight.sum(), [0])
    assert tpgm.radii["w"] == 1


def test_radii_of_a_real_problem_agree_with_its_validation_loss():
    """Digits, pre-trained with noise and fine-tuned on 40 of them. At the end no radius can improve the loss. It is
    flat in those between the bounds, and grows with those at 1e-8. The slopes are those of finite differences."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images = images.double() / 8 - 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()

    def train(x, y):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    train(images[:800] + 0.8 * torch.randn(800, 64), labels[:800])
    pretrained = copy.deepcopy(model.state_dict())
    train(images[800:840], labels[800:840])
    validation = (images[900:1300], labels[900:1300])
    tpgm = TPGM(model, anchor=pretrained, lr=3e-2)
    tpgm.update(loss_of(model), [validation], steps=200)
    checkpoint = tpgm.state_dict()
    checkpoint["adam"]["param_groups"][0]["lr"] = 3e-3
    tpgm.load_state_dict(checkpoint)
    tpgm.update(loss_of(model), [validation], steps=100)

    def loss_at(radii):
        with torch.no_grad():
            return float(plain_objective(model, pretrained, validation, radii, tpgm.names, "l2"))

    def finite_slope(radii, k, h=1e-6):
        step = h * (torch.arange(4) == k)
        return (loss_at(radii + step) - loss_at(radii - step)) / (2 * h)

    radii = torch.stack(list(tpgm.radii.values()))
    n = deviation(model.parameters(), pretrained.values())
    kinds = set()
    for k in range(4):
        slope = finite_slope(radii, k)
        kind = "floor" if radii[k] == 1e-8 else "learned" if radii[k] < n[k] else "free"
        assert {"floor": slope > 1e-3, "learned": abs(slope) < 1e-3, "free": slope == 0}[kind], tpgm.names[k]
        kinds.add(kind)
    assert kinds == {"floor", "learned", "free"}
    at_end = loss_at(radii)
    assert at_end < min(loss_at(0 * n), loss_at(n)) - 0.01  # better than pre-trained and fine-tuned weights
    start = TPGM(model, anchor=pretrained, init=0.05)
    start.update(loss_of(model), [validation])
    for k, slope in enumerate(first_slopes(start).tolist()):
        assert abs(finite_slope(0 * n + 0.05, k) - slope) < 1e-6 < abs(slope)
    tpgm.project_()
    assert abs(float(loss_of(model)(validation).detach()) - at_end) < 1e-12


def test_hooks_gradients_and_sharing():
    """A weight used twice is reduced once. Sparse gradients count. Frozen weights and accumulated gradients stay."""
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 4, sparse=True, dtype=torch.float64)
    tied = nn.Linear(4, 4, dtype=torch.float64)
    model = nn.ModuleDict({"e": embedding, "a": tied, "b": tied, "frozen": nn.Linear(4, 4, dtype=torch.float64)})
    model["frozen"].requires_grad_(False)
    tpgm = TPGM(model, init=0.1)
    assert tpgm.names == ["e.weight", "a.weight", "a.bias"]
    pretrained = [p.detach().clone() for p in tpgm._params]
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    index = torch.tensor([1, 1, 3, 6])

    def loss_fn(_):
        return (model["b"](torch.tanh(model["a"](model["e"](index)))) ** 2).sum()

    tpgm.update(loss_fn, [None])
    gamma = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    now = [p.detach() for p in tpgm._params]
    e, w, b = (oracle(p, z, g, "l2") for p, z, g in zip(now, pretrained, gamma, strict=True))
    ((torch.tanh(e[index] @ w.T + b) @ w.T + b) ** 2).sum().backward()
    torch.testing.assert_close(first_slopes(tpgm), gamma.grad, rtol=1e-9, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "updates", "projections"),
    [
        ({}, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),  # ResNets
        ({"f_proj": 6}, [6], [6]),  # ViTs
        ({"f_proj": 2}, [2, 4, 6], [2, 4, 6]),
        ({"f_proj": 3, "every_step": True}, [1, 4], [1, 2, 3, 4, 5, 6]),  # the released code
    ],
)
def test_f_proj_in_both_readings(options, updates, projections):
    model, pretrained, batches = fine_tuned()
    tpgm = TPGM(model, anchor=pretrained, init=0.1, **options)
    updated, projected = [], []
    for call in range(1, 7):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.5
        before = first_slopes(tpgm).clone() if updated else None
        if tpgm.step(loss_of(model), batches):
            updated.append(call)
            assert before is None or not torch.equal(first_slopes(tpgm), before)
        n = deviation([dict(model.named_parameters())[k] for k in tpgm.names], anchors_for(tpgm, pretrained))
        if bool((n <= torch.stack(list(tpgm.radii.values())) * (1 + 1e-9)).all()):
            projected.append(call)
    assert (updated, projected) == (updates, projections)


@pytest.mark.parametrize("save_anchors", [True, False])
@pytest.mark.parametrize("options", [*OPTIONS, dict(norm="l2", init="half_min", f_proj=9)], ids=str)
def test_resume_equals_no_interruption(options, save_anchors):
    model, pretrained, batches = fine_tuned(dtype=torch.float32)
    anchor = pretrained if not save_anchors else {k: v.bfloat16() for k, v in pretrained.items()}
    tpgm = TPGM(model, anchor=anchor, save_anchors=save_anchors, **options)
    for _ in range(4):
        tpgm.step(loss_of(model), batches)
    file = io.BytesIO()
    torch.save(tpgm.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    other = TPGM(twin, anchor="initial" if save_anchors else pretrained, **{**options, "lr": 0.7, "init": 0.9})
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(6):
        assert tpgm.step(loss_of(model), batches) == other.step(loss_of(twin), batches)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert all(map(torch.equal, tpgm.radii.values(), other.radii.values())) or options.get("f_proj")
    assert all(map(torch.equal, tpgm.alphas.values(), other.alphas.values()))


def test_a_foreign_checkpoint_is_refused():
    model, _, batches = fine_tuned(dtype=torch.float32)
    tpgm = TPGM(model, norm="mars")
    tpgm.update(loss_of(model), batches)
    saved, radii = tpgm.state_dict(), tpgm.radii
    for other, message in (
        (TPGM(model), "norm 'l2', here it is 'mars'"),
        (TPGM(model, norm="mars", exclude="stem.0"), "names differ, first 'stem.1.weight' for 'stem.0.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            tpgm.load_state_dict(other.state_dict())
    saved["anchors"]["head.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"'anchor' of parameter 'head\.bias'"):
        tpgm.load_state_dict(saved)
    assert all(map(torch.equal, tpgm.radii.values(), radii.values()))


def test_names_and_prefixes():
    model, pretrained, batches = fine_tuned(dtype=torch.float32)
    names = list(dict(model.named_parameters()))
    wrapped = {f"module.{k.replace('blocks.', 'blocks._fsdp_wrapped_module.')}": v for k, v in pretrained.items()}
    compiled = TPGM(torch.compile(model, backend="eager"), anchor=wrapped, exclude=["_orig_mod.stem.1", "head.bias"])
    assert compiled.names == [k for k in names if not k.startswith("stem.1") and k != "head.bias"]
    compiled.update(loss_of(model), batches)
    in_ddp = [(f"module.{name}", p) for name, p in model.named_parameters()]
    assert TPGM(in_ddp, exclude=["module.blocks.1"]).names == [k for k in names if not k.startswith("blocks.1")]
    assert "blocks.2.weight" not in names  # the other name of blocks.0.weight
    assert "blocks.0.weight" not in TPGM(model, exclude=["blocks.2.weight"]).names
    del pretrained["blocks.0.weight"]  # as safetensors does with one of two names
    saved = TPGM(model, anchor=pretrained).state_dict()["anchors"]
    assert torch.equal(saved["blocks.0.weight"], pretrained["blocks.2.weight"])


A_PAIR = [("a", nn.Parameter(torch.ones(2))), ("b.c", nn.Parameter(torch.ones(3, 2)))]


SHARED = torch.ones(2)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (A_PAIR, {"norm": "linf"}, ValueError, "unknown norm 'linf': choose one of 'l2', 'mars', 'mars_rows'"),
        (A_PAIR, {"exclude": ["a", "head"]}, ValueError, "exclude: 'head' is neither a parameter's name nor a prefix"),
        (A_PAIR, {"exclude": ["b."]}, ValueError, "'b.' is neither"),
        (A_PAIR, {"tv": 0.1, "groups": ["b", "blocks.1"]}, ValueError, "group 'b' has 1 trained parameters"),
        (A_PAIR, {"groups": [["a", "d"]]}, ValueError, "groups: 'd' is neither"),
        (A_PAIR, {"tv": 0.1}, ValueError, "tv needs groups"),
        (A_PAIR, {"tv": -0.1}, ValueError, "tv must be finite and at least 0"),
        (A_PAIR, {"radius_penalty": float("nan")}, ValueError, "radius_penalty must be finite"),
        (A_PAIR, {"lr": 0.0}, ValueError, "lr must be finite and above 0"),
        (A_PAIR, {"init": 0}, ValueError, "init must be finite and above 0"),
        (A_PAIR, {"init": float("inf")}, ValueError, "init must be finite and above 0"),
        (A_PAIR, {"init": "half"}, ValueError, "unknown init 'half'"),
        (A_PAIR, {"f_proj": 0}, ValueError, "f_proj must be at least 1"),
        (A_PAIR, {"exclude": ["a", "b"]}, ValueError, "no parameter takes part"),
        (A_PAIR, {"anchor": "inital"}, ValueError, "unknown anchor 'inital'"),
        (A_PAIR, {"anchor": {"a": torch.ones(2)}}, ValueError, "the anchor mapping lacks 'b.c'"),
        (A_PAIR, {"anchor": {"a": torch.ones(2), "b.c": torch.ones(2, 3)}}, ValueError, "'b.c' has shape"),
        (A_PAIR, {"anchor": [torch.ones(2), torch.ones(3, 2)]}, TypeError, "not a list"),
        (A_PAIR, {"anchor": dict(A_PAIR)}, ValueError, "parameter 'a' shares its memory"),
        ([("x", nn.Parameter(SHARED)), ("y", nn.Parameter(SHARED))], {}, ValueError, "'x' and 'y' share their memory"),
        ([("x", A_PAIR[0][1]), ("module.x", A_PAIR[1][1])], {}, ValueError, "two parameters are called 'x'"),
        ([("x", nn.Parameter(torch.ones(4)[::2]))], {}, ValueError, "'x' must be a dense leaf"),
        (dict(A_PAIR).values(), {}, TypeError, "pairs of name and parameter"),
        ([("x", torch.ones(2))], {}, ValueError, "no parameter takes part"),
    ],
)
def test_arguments_out_of_their_range(given, options, error, message):
    with pytest.raises(error, match=message):
        TPGM(given, **options)


def test_other_refusals():
    model, _, batches = fine_tuned(dtype=torch.float32)
    tpgm = TPGM(model)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        tpgm.update(loss_of(model), batches, steps=0)
    torch.utils.swap_tensors(model.stem[0].weight, nn.Parameter(model.stem[0].weight.detach().to("meta")))
    with pytest.raises(RuntimeError, match=r"parameter 'stem\.0\.weight' has left cpu since TPGM was made"):
        tpgm.update(loss_of(model), batches)


def test_order_of_the_parameters_changes_nothing():
    model, pretrained, batches = fine_tuned(dtype=torch.float32)
    pairs = list(model.named_parameters())
    turned = pairs[3:] + pairs[:3]
    results = []
    for given in (pairs, turned):
        tpgm = TPGM(given, anchor=pretrained, norm="mars_rows", init=0.2)
        model.eval()
        tpgm.update(loss_of(model), batches, steps=5)
        results.append(tpgm.radii)
    assert all(torch.equal(radius, results[1][name]) for name, radius in results[0].items())


def test_tpgm_keeps_its_radii_where_a_graph_has_captured_them():
    """Adam is copied for an update and when a checkpoint is loaded."""
    weight = nn.Parameter(torch.ones(3))
    tpgm = TPGM([("w", weight)], anchor="zero", init=0.5)
    (radii,) = tpgm._adam.param_groups[0]["params"]
    saved = tpgm.state_dict()
    for _ in range(2):
        tpgm.update(lambda _: weight.square().sum(), [0], steps=2)
    assert radii == tpgm.radii["w"] != 0.5
    assert tpgm._adam.state[radii]["step"] == 4
    tpgm.load_state_dict(saved)
    assert radii == tpgm.radii["w"] == 0.5
