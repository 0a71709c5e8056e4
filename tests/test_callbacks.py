"""What the callbacks share, without a trainer: held-out data, when radii are learned, WiSE-FT, figures, refusals."""

import copy
import importlib
import re
import sys
from math import nan, sqrt
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import robustft_kernels as rft
from robustft_kernels.callbacks import hold_out, shared
from robustft_kernels.telemetry import Telemetry


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 2))


def trained(net, optimizer, steps=3):
    """The model after a few steps, in training mode."""
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
    return net


DATA = TensorDataset(torch.arange(24.0).reshape(6, 4), torch.arange(6))


def test_held_out_examples_are_the_same_in_every_run_and_in_neither_part_twice():
    rest, held_out = hold_out(DATA, 0.34)
    assert len(held_out) == 2
    assert sorted([*rest.indices, *held_out.indices]) == list(range(6))
    assert hold_out(DATA, 0.34)[1].indices == held_out.indices
    assert any(hold_out(DATA, 0.34, seed)[1].indices != held_out.indices for seed in range(1, 9))
    assert [len(part) for share in (1e-9, 0.99) for part in hold_out(DATA, share)] == [5, 1, 1, 5]


def test_a_dataset_that_selects_is_divided_by_that():
    class Selecting(list):
        def select(self, indices):
            return Selecting(self[k] for k in indices)

    rest, held_out = hold_out(Selecting("abcdef"), 0.5)
    assert sorted(rest + held_out) == list("abcdef")
    assert type(rest) is type(held_out) is Selecting


@pytest.mark.parametrize(
    ("data", "share", "error", "message"),
    [
        (DATA, 1.0, ValueError, "share must be"),
        (DATA, 0, ValueError, "above 0"),
        (Subset(DATA, [0]), 0.5, ValueError, "takes two"),
        (iter(()), 0.5, TypeError, "a length and an index"),
    ],
)
def test_nothing_can_be_held_out_of_that(data, share, error, message):
    with pytest.raises(error, match=message):
        hold_out(data, share)


def test_shared_examples_are_found_wherever_they_are():
    rest, held_out = hold_out(DATA, 0.5)
    shared.check_apart(held_out, {"a": rest, "b": None, "c": [DataLoader(rest)], "d": {"e": rest}})
    inner = Subset(held_out, [1])  # an example of it, by an index of its own
    for data in (DATA, held_out, inner, DataLoader(held_out), [DataLoader(rest), DataLoader(inner)], {"e": DATA}):
        with pytest.raises(ValueError, match=r"shares examples with the training data.*hold_out\(train, 0.1\)"):
            shared.check_apart(held_out, {"the training data": data})


def learner(every=2, steps=1, data=DATA, batch_size=4, **options):
    return shared.RadiusLearner(data, every, steps, batch_size, 0, options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": "epoch"}, ValueError, "every must be a number of optimizer steps, 'evaluation' or 'end'"),
        ({"every": 0}, ValueError, "every must be"),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"batch_size": -1}, ValueError, "batch_size must be"),
        ({"f_proj": 3}, ValueError, "f_proj is TPGM's own clock; here every="),
        ({"data": []}, ValueError, "held_out is empty"),
        ({"data": iter(())}, TypeError, "held_out is a tuple_iterator"),
    ],
)
def test_a_learner_refuses(options, error, message):
    with pytest.raises(error, match=message):
        learner(**options)


def test_radii_are_due_once_a_moment():
    each, evaluation = learner(), learner("evaluation")
    assert [step for step in range(7) if each.is_due("step", step)] == [2, 4, 6]
    assert not each.is_due("evaluation", 2)
    assert not evaluation.is_due("step", 2)
    assert not evaluation.is_due("evaluation", 0)  # nothing has moved yet
    evaluation.begin(model())
    with torch.inference_mode():  # as trainers evaluate
        evaluation.learn(3, lambda batch: evaluation.tpgm._model(batch[0]).square().mean())
    assert not evaluation.is_due("evaluation", 3)
    assert evaluation.is_due("evaluation", 4)


def test_a_loader_gives_its_data_collator_and_batch_size():
    def double(examples):
        return 2 * torch.stack([inputs for inputs, _ in examples])

    of = learner(data=DataLoader(DATA, 3, collate_fn=double), batch_size=None)
    assert [len(batch) for batch in of.batches] == [3, 3]
    assert torch.equal(of.collate([DATA[1]]), 2 * DATA[1][0][None])
    assert sorted(k for batch in of.batches for k in batch) == list(range(6))
    assert of.batches != [[0, 1, 2], [3, 4, 5]]  # data is often sorted by class


@pytest.mark.parametrize("first", ["load", "begin"])
def test_a_learner_goes_on_from_its_state(first):
    """Also if it is loaded before there is a model, as Lightning does, and anchored elsewhere."""
    net = model()
    whole = learner(batch_size=2)
    whole.begin(net)

    def learn(of, step):
        with torch.no_grad():
            for param in net.parameters():
                param.add_(0.01 * step)
        of.learn(step, lambda batch: net(batch[0]).square().mean())

    learn(whole, 2)
    saved, weights = copy.deepcopy(whole.state_dict()), copy.deepcopy(net.state_dict())
    told = whole.telemetry()
    learn(whole, 4)
    expected = whole.tpgm.radii

    net.load_state_dict(weights)
    resumed = learner(batch_size=2)
    for action in ("load", "begin") if first == "load" else ("begin", "load"):
        resumed.begin(net) if action == "begin" else resumed.load_state_dict(saved)
    assert repr(resumed.telemetry()) == repr(told)  # with its nan
    learn(resumed, 4)
    assert resumed.tpgm.radii == expected
    with pytest.raises(ValueError, match="the same held_out and batch_size"):
        resumed.load_state_dict({**saved, "batches": [5, 3]})


@pytest.mark.parametrize("norm", ["l2", "mars", "mars_rows"])
@pytest.mark.parametrize("options", [{}, {"save_anchors": False}, {"anchor": "zero"}])
def test_telemetry_of_radii(norm, options):
    net = model()
    of = learner(norm=norm, init=0.1, **options)
    start = {name: param.detach().clone() for name, param in net.named_parameters()}
    of.begin(net)
    trained(net, torch.optim.SGD(net.parameters(), lr=1.0))
    of.learn(2, lambda batch: net(batch[0]).square().mean())
    for name, told in of.telemetry().items():
        anchor = torch.zeros_like(start[name]) if "anchor" in options else start[name]
        delta = (net.get_parameter(name) - anchor).detach()
        size = delta.norm().item() if norm == "l2" else delta.abs().sum(-1).max().item()  # a vector is one row
        assert told.deviation == pytest.approx(nan if "save_anchors" in options else size, rel=1e-5, nan_ok=True)
        assert told.radius == float(of.tpgm.radii[name])
        assert told.alpha == pytest.approx(float(of.tpgm.alphas[name].mean()))
        assert told.selected == pytest.approx(float((of.tpgm.alphas[name] < 1).double().mean()))
        assert told.deviation != told.deviation or told.deviation <= told.radius * (1 + 1e-5)


def test_figures_are_the_sums_that_they_claim():
    told = {"a": Telemetry(3.0, 0.1, 1.0, 0.0, 0.0, nan), "b": Telemetry(4.0, nan, 0.5, 0.25, 1.0, 4.0)}
    assert shared.summary(told) == {"deviation": 5.0, "alpha": 0.75, "selected": 1.0}
    assert shared.summary({"a": Telemetry(nan, nan, 1.0, 0.0, nan, nan)}) == {"alpha": 1.0, "selected": 0.0}
    assert shared.scalars(told, "x/", by_parameter=False) == {"x/deviation": 5.0, "x/alpha": 0.75, "x/selected": 1.0}
    each = shared.scalars(told, "x/", by_parameter=True)
    assert each["x/radius/b"] == each["x/deviation/b"] == 4.0
    assert "x/radius/a" not in each
    assert each["x/deviation"] == sqrt(25)


def test_wrappers_are_seen_through_down_to_ours():
    ours = rft.AdamSPD(model().parameters())
    assert shared.unwrapped(SimpleNamespace(optimizer=SimpleNamespace(optimizer=ours))) is ours
    around = rft.Anchored(torch.optim.SGD(model().parameters(), lr=0.1), "spd", strength=1.0)
    assert shared.unwrapped(SimpleNamespace(optimizer=around)) is around
    assert shared.telemetry_of([torch.optim.SGD(model().parameters(), lr=0.1), ours]).keys() == ours.telemetry().keys()
    with pytest.raises(TypeError, match="SGD has no telemetry"):
        shared.telemetry_of([torch.optim.SGD(model().parameters(), lr=0.1)])


@pytest.mark.parametrize("anchor", ["initial", "zero"])
def test_wise_ft_goes_toward_the_anchors_and_leaves_what_has_none(anchor):
    net = model()
    start = {name: of.clone() for name, of in net.state_dict().items()}
    head = {"params": net[3].parameters(), "method": "none"}
    optimizer = rft.AdamSPD([{"params": net[:3].parameters()}, head], lr=0.1, strength=0.1, anchor=anchor)
    fine = {name: of.clone() for name, of in trained(net, optimizer).state_dict().items()}
    interpolation = shared.Interpolation(0.25, None, {})
    interpolation.check(net, [optimizer])
    interpolation.apply(net, [SimpleNamespace(optimizer=optimizer)])
    for name, value in net.state_dict().items():
        held = name.startswith(("0.", "2.")) and name in dict(net.named_parameters())
        theta_0 = torch.zeros_like(start[name]) if anchor == "zero" else start[name]
        expected = theta_0 * 0.75 + fine[name] * 0.25 if held else fine[name]
        assert torch.equal(value, expected), name


def test_tied_weights_are_interpolated_once():
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    net["b"].weight = net["a"].weight
    optimizer = rft.AdamSPD(net.parameters(), lr=0.1)
    start = net["a"].weight.detach().clone()
    net["a"](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    fine = net["a"].weight.detach().clone()
    shared.Interpolation(0.5, None, {}).apply(net, [optimizer])
    assert torch.equal(net["b"].weight, start * 0.5 + fine * 0.5)


def test_a_file_is_theta_0_too(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    net, other = model(), model()
    with torch.no_grad():
        other[0].weight.add_(1)
    save(net.state_dict(), tmp_path / "model.safetensors")
    of = shared.Interpolation(0.5, tmp_path, {"exclude": "3"})
    of.check(other, [])
    expected = rft.wise_ft(net, other, 0.5, exclude="3")
    of.apply(other, [])
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_wise_ft_that_could_not_be_made_is_refused_before_training():
    with pytest.raises(ValueError, match="alpha must be"):
        shared.Interpolation(1.5, None, {})
    with pytest.raises(ValueError, match="exclude needs pretrained="):
        shared.Interpolation(0.5, None, {"exclude": "head"})
    net = model()
    for optimizer in (torch.optim.SGD(net.parameters(), lr=0.1), rft.AnchoredAdamW(net.parameters(), method="none")):
        with pytest.raises(ValueError, match="give pretrained="):
            shared.Interpolation(0.5, None, {}).check(net, [optimizer])
    with pytest.raises(ValueError, match="pretrained lacks"):
        shared.Interpolation(0.5, {"0.weight": torch.zeros(8, 4)}, {}).check(net, [])


@pytest.mark.parametrize(
    ("module", "library", "command"),
    [
        ("huggingface", "transformers", "pip install transformers accelerate"),
        ("lightning", "lightning.pytorch", "pip install lightning"),
    ],
)
def test_a_missing_library_is_one_line_with_the_command(module, library, command, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"robustft_kernels.callbacks.{module}", raising=False)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(f"robustft_kernels.callbacks.{module}")
    assert str(raised.value) == f"robustft_kernels.callbacks.{module} needs it: {command}"


def test_nothing_else_imports_the_callbacks():
    """So `import robustft_kernels` needs no trainer."""
    for path in Path(rft.__file__).parent.rglob("*.py"):
        if path.parent.name != "callbacks":
            assert not re.search(r"^\s*(from|import)\b.*\bcallbacks\b", path.read_text(), flags=re.M), path
