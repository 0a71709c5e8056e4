"""The emoji experiment without its data: every method on random images, and the report on made-up rows."""

import pytest
import torch

from examples.emoji import methods, report, run
from examples.emoji.data import STYLES
from examples.emoji.methods import METHODS
from examples.emoji.model import WIDTH, Encoder
from examples.emoji.report import BASELINE, ZERO_SHOT, Config
from examples.emoji.task import Task


@pytest.fixture(scope="module")
def task():
    g = torch.Generator().manual_seed(0)
    encoder = Encoder()
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            p.fill_(1.0) if name.endswith("scale") else p.normal_(0, 0.1, generator=g)
        for name, buffer in encoder.named_buffers():
            buffer.fill_(float(name.endswith("var")))

    def draw(n):
        return torch.randint(256, (n, 3, 32, 32), generator=g, dtype=torch.uint8), torch.randint(4, (n,), generator=g)

    (images, labels), (val_images, val_labels), (tests, test_labels) = draw(96), draw(6), draw(8)
    classes = torch.nn.functional.normalize(torch.randn(4, WIDTH, generator=g), dim=1)
    test = dict.fromkeys(STYLES, tests)
    return Task(encoder, classes, STYLES[0], images, labels, val_images, val_labels, test, test_labels)


@pytest.fixture
def rows_of(task, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "task_of", lambda *_: task)
    monkeypatch.setattr(methods, "RADIUS_STEPS", 4)
    return lambda method, strength, **more: run.rows_of(run.Setting(method, 1e-3, strength, 0, **more), "", 2, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(rows_of, method):
    strength = METHODS[method].strengths[0]
    found = rows_of(method, strength)
    if joined := METHODS[method].joined:
        assert [row["method"] for row in found] == list(joined)
        assert 0 < found[1]["deviation"] < found[0]["deviation"], "Model Stock is nearer to θ₀ than the soup"
        return
    strengths = [(name, s) for name, further in METHODS[method].afterwards.items() for s in further.strengths]
    assert [(row["method"], row["strength"]) for row in found[1:]] == strengths
    moved = found[0]["tensors"]
    trains = METHODS[method].trains
    assert all((moved[name] > 0) == name.endswith(trains) for name in moved)
    for row in found[1:]:
        assert row["base"] == strength
        assert 0 < row["deviation"] <= found[0]["deviation"]
        if row["method"].startswith("WI"):
            assert row["deviation"] == pytest.approx(row["strength"] * found[0]["deviation"], rel=1e-3)
    if method == "PGM":
        assert max(moved.values()) <= strength * (1 + 1e-5)


def test_a_phase_may_have_one_step(task):
    encoder = run.finetune(task, run.Setting("LP-FT", 1e-3, 0.0, 0), epochs=1)
    assert max(run.deviations(encoder, task.start).values()) > 0


def test_a_sweep_stands_alone_and_a_share_trains_on_fewer(rows_of):
    assert len(rows_of("SPD", 0.5, sweep=True)) == 1
    assert rows_of("L2-SP", 1.0, share=0.1)[0]["tensors"] != rows_of("L2-SP", 1.0)[0]["tensors"]


def test_report(tmp_path):
    """The choice is by validation alone, and not from the sweep."""
    rows = []
    for seed in range(3):
        for method, lr, strength, val, ood, sweep, share in (
            (ZERO_SHOT, 0.0, 0.0, 40, 50, False, 1.0),
            (BASELINE, 1e-3, 0.0, 60, 40, False, 1.0),
            (BASELINE, 1e-4, 0.0, 55, 45, False, 1.0),
            ("TPGM", 1e-3, 0.0, 60, 52, False, 1.0),
            (BASELINE, 1e-3, 0.0, 60, 30, False, 0.1),
            ("TPGM", 1e-3, 0.0, 60, 35, False, 0.1),
            ("SPD", 1e-3, 1.0, 61, 48 + seed, False, 1.0),
            ("SPD", 1e-3, 2.0, 59, 99, False, 1.0),
            ("SPD", 1e-3, 4.0, 99, 55, True, 1.0),
            ("WISE-SPD", 1e-3, 0.5, 60, 49, False, 1.0),
        ):
            base = 1.0 if method == "WISE-SPD" else 0.0
            deviation = 10 / (1 + strength) * (0.5 if method == "TPGM" else 1)
            rows.append({
                "method": method, "lr": lr, "strength": strength, "base": base, "seed": seed, "sweep": sweep,
                "share": share, "val": val, "id": val, "ood": ood, "tests": 289, "deviation": deviation,
                "tensors": {f"blocks.{k}.project.weight": deviation for k in range(6)}, **dict.fromkeys(STYLES, ood),
            })  # fmt: skip
    runs = report.by_config(rows)
    assert report.chosen(runs)["SPD"] == Config("SPD", 1e-3, 1.0)
    assert report.paired(runs[Config("SPD", 1e-3, 1.0)], runs[Config(BASELINE, 1e-3, 0.0)], "ood").startswith("+9.0 [+")
    text = report.write(rows, STYLES[0], tmp_path)
    assert "| SPD | 0.001 | 1 | 61.0 |" in text
    assert "SPD at learning rate 0.001; the first row is AdamW" in text
    assert "| all | lower | 10.000 | 5.000 | 0.50 |" in text
    assert "| a tenth | upper | 10.000 | 5.000 | 0.50 |" in text
    pictures = {file.name for file in tmp_path.glob("*.png")}
    assert pictures == {f"emoji-{name}.png" for name in ("id-ood", "deviation", "blocks", "radii")}
