"""What a step tells of itself, against the weights it left, for every method. How that is read, logged and drawn."""

import itertools
import sys
from math import isnan, nan

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.finetune.projection import deviation
from robustft_kernels.optim.wrapper import Anchored
from robustft_kernels.step import anchor_sizes
from robustft_kernels.telemetry import Telemetry, draw, log
from tests.no_reads import NoReads
from tests.test_wrapper import TURNS, give_grads, make, run

each_backend = pytest.mark.parametrize("served_by", [n for n in ("native", "reference") if not rft.backends()[n]])
RULES = [(method, norm) for method, of in rft.METHODS.items() for norm in of.rules]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("method", "norm"), RULES)
def test_tells_what_the_weights_are(method, norm, dtype, served_by):
    """Deviations are sums of the step, times α. They are exact up to the rounding of the weights that the pull leaves.
    That is an ulp of the largest weight for each."""
    params = make(dtype)
    anchors = [p.detach().clone() for p in params]
    optimizer = rft.AnchoredAdamW(
        params, lr=1e-2, method=method, norm=norm, strength=1.3, radius=0.05, anchor=anchors, backend=served_by
    )
    selections = dict.fromkeys(map(str, range(len(params))), 0.0)
    inconsistencies = dict(selections)
    for t in range(len(TURNS)):
        run(optimizer, params, 1, start=t)
        told = optimizer.telemetry()
        assert list(told) == list(selections)
        measured_by = "l2" if norm == "l2" else "mars"
        for k, of in enumerate(told.values()):
            p, anchor, alphas = params[k].detach(), anchors[k], optimizer._results[params[k]].alphas
            want, whole = (float(deviation(*pair, measured_by)) for pair in (([p], [anchor]), ([anchor], None)))
            ulps = torch.finfo(dtype).eps * float(p.abs().max()) if p.numel() else 0.0
            terms = p.numel() ** 0.5 if norm == "l2" else p.numel() / (len(p) if p.dim() > 1 else 1) if p.numel() else 0
            assert of.deviation == pytest.approx(want, abs=ulps * terms, rel=1e-6)
            assert of.relative_deviation == pytest.approx(of.deviation / whole if whole else nan, nan_ok=True)
            assert of.alpha == pytest.approx(float(alphas.mean()) if len(alphas) else 1.0)
            assert of.selected == pytest.approx(float((alphas != 1).float().mean()) if len(alphas) else 0.0)
            selections[str(k)] += of.selected
            assert of.selections == pytest.approx(selections[str(k)])
            inconsistent = optimizer._results[params[k]].results[:, 0] > 0
            inconsistencies[str(k)] += float(inconsistent.double().mean()) if len(alphas) else 0.0
            counted = pytest.approx(inconsistencies[str(k)] if method == "spd" else nan, nan_ok=True)
            assert of.inconsistencies == counted
            radius = {"project": 0.05, "ftp": float(optimizer.state[params[k]].get("radius_state", [nan])[0])}
            assert of.radius == pytest.approx(radius.get(method, nan), nan_ok=True)
    told = told["3"]
    assert (told.selections > 0) == (method not in ("none", "l2sp_coupled", "digrap", "mars_sp"))
    if method in ("project", "ftp"):
        assert told.deviation == pytest.approx(told.radius, rel=1e-5)


def test_names_and_what_there_is_not():
    """By name. Without names, by place over all groups. What a parameter does not have is nan."""
    a, b, c, d = make(shapes=[(5, 7), (3,), (4, 2), (6,)])
    groups = [
        {"params": [("a", a), ("b", b)], "method": "spd"},
        {"params": [("c", c)], "anchor": "zero", "method": "project", "radius": torch.tensor(0.5), "norm": "mars"},
        {"params": [("d", d)]},
    ]
    optimizer = rft.AnchoredAdamW(groups, lr=1e-2)
    start = optimizer.telemetry()
    assert list(start) == ["a", "b", "c", "d"]
    assert start["a"] == pytest.approx(Telemetry(0.0, 0.0, 1.0, 0.0, 0.0, nan, 0.0), nan_ok=True)
    largest = float(c.detach().abs().sum(1).max())
    assert start["c"] == pytest.approx(Telemetry(largest, nan, 1.0, 0.0, 0.0, 0.5), nan_ok=True)
    assert start["d"] == pytest.approx(Telemetry(nan, nan, 1.0, 0.0, 0.0, nan), nan_ok=True)
    give_grads([a, b, c, d], 0)
    b.grad = None
    optimizer.step()
    told = optimizer.telemetry()
    assert told["a"].deviation > 0
    assert told["b"] == pytest.approx(start["b"], nan_ok=True)
    assert told["c"].deviation == pytest.approx(0.5)
    assert told["c"].selections == 1
    unnamed = rft.SGDSPD([{"params": [a, b]}, {"params": [c]}])
    assert list(unnamed.telemetry()) == ["0", "1", "2"]
    optimizer.load_state_dict(optimizer.state_dict())
    loaded = optimizer.telemetry()
    assert loaded["a"].deviation == pytest.approx(told["a"].deviation)
    assert loaded["c"].selections == 0


def test_one_transfer_and_no_other_read(monkeypatch):
    params = make()
    groups = [{"params": params[:4]}, {"params": params[4:], "method": "ftp"}]
    optimizer = rft.AdamSPD(groups, lr=1e-2)
    run(optimizer, params, 3)
    transfers, transfer = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: transfers.append(1) or transfer(tensor))
    with NoReads():
        told = optimizer.telemetry()
    assert len(transfers) == 1
    assert all(of.selections > 0 for of in list(told.values())[4:6])


def test_anchors_are_measured_once(monkeypatch):
    params = make()
    optimizer = rft.AdamSPD(params)
    run(optimizer, params, 1)
    measured = []
    measure = anchor_sizes.measure
    monkeypatch.setattr(anchor_sizes, "measure", lambda of, norm: measured.append(len(of)) or measure(of, norm))
    first = optimizer.telemetry()
    assert repr(optimizer.telemetry()) == repr(first)
    assert sum(measured) == len(params)
    optimizer.state[params[3]]["anchor"].mul_(2)
    assert optimizer.telemetry()["3"].relative_deviation == pytest.approx(first["3"].relative_deviation / 2)
    assert sum(measured) == len(params) + 1


@each_backend
def test_counts_go_on(served_by):
    """Also when gradients are missing for a time, and when a step is skipped."""
    for kind in ("fused", "wrapped"):
        params = make()
        optimizer = rft.AdamL2SP(params, lr=1e-2, backend=served_by)
        if kind == "wrapped":
            optimizer = Anchored(torch.optim.AdamW(params, lr=1e-2), "l2sp", backend=served_by)
        run(optimizer, params, 2)
        for t in range(3):
            give_grads(params, t)
            params[3].grad = None
            optimizer.step()
        run(optimizer, params, 1)
        assert [of.selections for of in optimizer.telemetry().values()][1:5] == [6, 6, 3, 6]
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    fused = rft.AdamSPD(params, lr=1e-2, backend=served_by)
    run(fused, params, 3)
    before = fused.telemetry()
    give_grads(params, 2)
    params[2].grad[0] = scaler.scale(torch.tensor(torch.inf))
    scaler.step(fused)
    for name, of in fused.telemetry().items():
        assert of == pytest.approx(before[name], nan_ok=True)


def numbers(step=1, layers=5):
    return {
        f"layer{k}.weight": Telemetry(0.1 * k * step, 0.01 * k, 0.9, 1.0, float(step * k) / layers, [nan, 0.2][k % 2])
        for k in range(layers)
    }


def test_log():
    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, value, step):
            assert not isnan(value)
            self.scalars[tag] = value, step

    log(numbers(layers=2), writer := Writer(), 7, prefix="spd/")
    assert writer.scalars["spd/deviation/layer1.weight"] == (0.1, 7)
    assert writer.scalars["spd/radius/layer1.weight"] == (0.2, 7)
    assert len(writer.scalars) == 2 * 6 - 1


def test_draw(tmp_path):
    pytest.importorskip("matplotlib")
    single = draw(numbers(), tmp_path / "single.png")
    above, below = single.axes
    assert above.lines[0].get_ydata() == pytest.approx([0.1 * k for k in range(5)])
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["deviation", "radius"]
    assert [bar.get_height() for bar in below.patches] == pytest.approx([0.2 * k for k in range(5)])
    assert [tick.get_text() for tick in below.get_xticklabels()] == list(numbers())
    steps = (10, 20, 30, 50)
    history = draw({step: numbers(step) for step in reversed(steps)}, tmp_path / "history.pdf")
    above, below, _ = history.axes
    assert len(above.lines) == 2 * len(steps)
    assert [text.get_text() for text in above.get_legend().get_texts()] == [f"step {n}" for n in steps]
    shares = below.collections[0].get_array()  # a row for each interval; selections grow by k/5 in each step
    assert shares.shape == (3, 5)
    assert shares[2].tolist() == pytest.approx([0.2 * k for k in range(5)])
    mixed = {"body.weight": numbers()["layer1.weight"], "body.bias": numbers()["layer2.weight"]}
    assert [list(line.get_xdata()) for line in draw(mixed).axes[0].lines] == [[0], [1], [0]]  # a line for each kind
    assert not draw({"head": Telemetry(nan, nan, 1, 0, 0, nan)}).axes[0].lines
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("single.png", "history.pdf"))
    many = draw({step: numbers(step, layers=121) for step in range(100)})
    names = many.axes[1].get_xticklabels()
    assert [name.get_text() for name in names] == [*numbers(layers=121)][::3]
    many.draw_without_rendering()
    boxes = [name.get_window_extent() for name in names]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    for nothing in ({}, {3: {}}):
        with pytest.raises(ValueError, match=r"no telemetry to draw|of at least one"):
            draw(nothing)
    with pytest.raises(ValueError, match="of the same parameters"):
        draw({1: numbers(), 2: numbers(layers=4)})


def test_draw_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        draw(numbers())


def test_infinite_weights_are_told():
    p = nn.Parameter(torch.tensor([1.0, torch.inf]))
    optimizer = rft.AdamSPD([p], anchor=[torch.zeros(2)])
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.telemetry()["0"].alpha == 1
    assert not optimizer.telemetry()["0"].deviation < torch.inf


def test_counts_outlive_a_new_group():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = rft.AnchoredAdamW(params[:1], method="l2sp", strength=10.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:]})
    optimizer.step()
    assert [of.selections for of in optimizer.telemetry().values()] == [2, 1]


def test_it_prints_in_one_line_of_four_digits():
    told = repr(Telemetry(1 / 3, 2e-9, 1.0, 0.0, 12.0, nan))
    numbers = "deviation=0.3333, relative_deviation=2e-09, alpha=1, selected=0, selections=12, radius=nan"
    numbers += ", inconsistencies=nan"
    assert told == f"Telemetry({numbers})"
