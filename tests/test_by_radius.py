"""A radius for each parameter, and radii from a free run."""

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.finetune.projection import deviation

safetensors = pytest.importorskip("safetensors.torch")


def make_model(seed=0):
    """A vector path with a tail, several chunks, and a head."""
    torch.manual_seed(seed)
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(67, 131), nn.Linear(131, 300)), "head": nn.Linear(300, 3)})


RADII = {"body.0": 0.02, "body.0.bias": 0.003, "body.1.weight": 0.05, "": 0.007}


def radius_of(name):
    return {"body.0.weight": 0.02, "body.0.bias": 0.003, "body.1.weight": 0.05}.get(name, 0.007)


def train(model, optimizer, steps=4):
    for k in range(steps):
        torch.manual_seed(k)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()


@pytest.mark.parametrize("norm", ["l2", "mars", "mars_rows"])
@pytest.mark.parametrize("cls", [rft.AdamPGM, rft.SGDPGM])
def test_by_name_is_a_group_for_each_radius(cls, norm):
    one, other = make_model(), make_model()
    ours = cls(one.named_parameters(), lr=1e-2, radius=RADII, norm=norm)
    groups = [{"params": [(n, p)], "radius": radius_of(n)} for n, p in other.named_parameters()]
    train(one, ours), train(other, cls(groups, lr=1e-2, norm=norm))
    start = list(make_model().parameters())
    reached = deviation(one.parameters(), start, "l2" if norm == "l2" else "mars")
    for (name, param), same, n in zip(one.named_parameters(), other.parameters(), reached.tolist(), strict=True):
        assert torch.equal(param, same), name
        assert n <= radius_of(name) * (1 + 1e-4)
        assert n > 0.3 * radius_of(name), "the radius binds"


def test_parameters_of_one_radius_share_a_group():
    model = make_model()
    groups = rft.AdamPGM(model.named_parameters(), radius={"body": 0.5, "head": 2}).param_groups
    assert [(group["radius"], group["param_names"][-1]) for group in groups] == [(0.5, "body.1.bias"), (2, "head.bias")]


def test_in_order_and_live():
    """The elements of a tensor are views: a step reads what is written there."""
    model, radii = make_model(), torch.full((6,), 1e-3)
    optimizer = rft.AdamPGM(model.parameters(), lr=1e-2, radius=radii)
    train(model, optimizer)
    start = list(make_model().parameters())
    torch.testing.assert_close(deviation(model.parameters(), start), torch.full((6,), 1e-3).double(), rtol=1e-4, atol=0)
    radii[2] = 2e-3
    train(model, optimizer)
    expected = torch.tensor([1, 1, 2, 1, 1, 1]).double() * 1e-3
    torch.testing.assert_close(deviation(model.parameters(), start), expected, rtol=1e-4, atol=0)


def test_lists_of_anchors_are_split_alike():
    model, zero = make_model(), [torch.zeros_like(p) for p in make_model().parameters()]
    optimizer = rft.AdamPGM([{"params": model.named_parameters(), "anchor": zero}], lr=1e-3, radius=RADII)
    train(model, optimizer, 1)
    for name, param in model.named_parameters():
        assert param.norm() <= radius_of(name) * (1 + 1e-4)


def test_groups_that_read_no_radius_take_none():
    model = make_model()
    optimizer = rft.for_model("AdamPGM", head="head", radius={"body.0": 0.1, "body.1": 0.2, "head.bias": 9})(model)
    assert [(group["method"], group["radius"]) for group in optimizer.param_groups] == [
        ("project", 0.1),
        ("project", 0.2),
        ("none", None),
    ]


def test_a_checkpoint_of_it_goes_on_with_the_same_bits(tmp_path):
    one, other = make_model(), make_model(1)
    first = rft.AdamPGM(one.named_parameters(), lr=1e-2, radius=RADII)
    train(one, first)
    torch.save([one.state_dict(), first.state_dict()], tmp_path / "kept.pt")
    weights, state = torch.load(tmp_path / "kept.pt", weights_only=True)
    other.load_state_dict(weights)
    second = rft.AdamPGM(other.named_parameters(), lr=1e-2, radius=RADII)
    second.load_state_dict(state)
    train(one, first), train(other, second)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("radius", "error", "message"),
    [
        ({"body": 1.0}, ValueError, "radius has none for 'head.weight', 'head.bias'"),
        ({"": 1.0, "bdoy": 2.0}, ValueError, "'bdoy'"),
        ({"": -1.0}, ValueError, r"radius\[''\] must be finite and above 0"),
        ({"": "0.3"}, TypeError, "the text '0.3'"),
        ([0.1, 0.2], ValueError, "2 radii for 6 parameters"),
        (torch.ones(6, 2), ValueError, "must be one number"),
    ],
)
def test_what_is_refused(radius, error, message):
    with pytest.raises(error, match=message):
        rft.AdamPGM(make_model().named_parameters(), radius=radius)


def test_names_are_needed():
    with pytest.raises(ValueError, match="needs named parameters"):
        rft.AdamPGM(make_model().parameters(), radius=RADII)
    with pytest.raises(TypeError, match="pairs of name and parameter"):
        rft.by_radius(make_model().parameters(), RADII)


def test_a_group_is_added_whole_or_not_at_all():
    """The second part is refused, and the first goes too."""
    model = make_model()
    optimizer = rft.AdamPGM(model["body"][0].named_parameters(), radius=1.0)
    bad = {"params": [("a", torch.zeros(3, requires_grad=True)), ("b", torch.ones(2, requires_grad=True))]}
    bad |= {"radius": {"a": 1.0, "b": 2.0}, "anchor": [torch.zeros(3), torch.zeros(5)]}
    before = len(optimizer.state)
    with pytest.raises(ValueError, match="shape"):
        optimizer.add_param_group(bad)
    assert (len(optimizer.param_groups), len(optimizer.state)) == (1, before)
    optimizer.add_param_group({"params": model["head"].named_parameters(), "radius": {"weight": 1.0, "bias": 2.0}})
    assert [group["radius"] for group in optimizer.param_groups] == [1.0, 1.0, 2.0]


def test_around_another_optimizer():
    model = make_model()
    inner = torch.optim.AdamW(rft.by_radius(model.named_parameters(), RADII), lr=1e-2)
    train(model, rft.Anchored(inner, method="project"))
    start = list(make_model().parameters())
    for (name, _), n in zip(model.named_parameters(), deviation(model.parameters(), start).tolist(), strict=True):
        assert 0.3 * radius_of(name) < n <= radius_of(name) * (1 + 1e-4)
    with pytest.raises(ValueError, match="by_radius"):
        rft.Anchored(torch.optim.AdamW(model.parameters()), method="project", radius=RADII)


@pytest.mark.parametrize("norm", ["l2", "mars", "mars_rows"])
def test_suggested_radii(norm, tmp_path):
    base, tuned = make_model(), make_model()
    train(tuned, torch.optim.AdamW(tuned.parameters(), lr=1e-2))
    with torch.no_grad():
        tuned["head"].bias.copy_(base["head"].bias)
    c = {name: (p - q).detach() for (name, p), q in zip(tuned.named_parameters(), base.parameters(), strict=True)}
    sizes = {n: (of.norm() if norm == "l2" else of.reshape(len(of), -1).abs().sum(1).max()) for n, of in c.items()}
    if norm != "l2":  # a vector is one row
        sizes |= {n: of.abs().sum() for n, of in c.items() if of.dim() == 1}
    safetensors.save_file(base.state_dict(), tmp_path / "model.safetensors")
    for theta_0 in (base.state_dict(), tmp_path, list(base.parameters())):
        found = rft.suggest_radii(tuned, theta_0, 0.25, norm)
        assert found["head.bias"] == min(found.values())
        for name in sizes.keys() - {"head.bias"}:
            assert found[name] == pytest.approx(0.25 * float(sizes[name]), rel=1e-5)
    rft.AdamPGM(base.named_parameters(), radius=found)


def test_suggested_radii_refuse():
    model = make_model()
    with pytest.raises(ValueError, match="no parameter deviates"):
        rft.suggest_radii(model, {n: p.clone() for n, p in model.named_parameters()})
    for fraction in (0, -1, 1.5):
        with pytest.raises(ValueError, match="fraction"):
            rft.suggest_radii(model, None, fraction)
    with pytest.raises(ValueError, match="as they are"):
        rft.suggest_radii(model, "initial")
