"""The sentiment experiment without its data: every method on made-up sentences and a small random encoder."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers", exc_type=ImportError)
pytest.importorskip("peft", exc_type=ImportError)

from transformers import BertConfig, BertModel

from examples.sentiment import data, report, run
from examples.sentiment.data import DOMAINS
from examples.sentiment.methods import ALPHAS, METHODS
from examples.sentiment.model import Classifier, Examples, Task, batches, padded
from examples.sentiment.report import ZERO_SHOT, Config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT


@pytest.fixture(scope="module")
def task():
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)

    def draw(count):
        """Positive sentences are of even words."""
        labels = torch.arange(count) % 2
        lengths = torch.randint(3, 9, (count,), generator=g).tolist()
        words = [torch.randint(1, 30, (n,), generator=g) for n in lengths]
        return Examples([(2 * w - label).tolist() for w, label in zip(words, 1 - labels, strict=True)], labels)

    start = Classifier(BertModel(config, add_pooling_layer=False), 32).eval()
    test = {domain: draw(20) for domain in DOMAINS}
    return Task(start, DOMAINS[0], draw(96), draw(20), test, [[1, 3], [2, 4, 6]])


@pytest.fixture
def rows_of(task, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "task_of", lambda *_: task)
    return lambda method, lr, strength: run.rows_of(run.Setting(method, lr, strength, 0), DOMAINS[0], 3, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(rows_of, task, method):
    before = [param.clone() for param in task.start.parameters()]
    of = METHODS[method]
    first, *wise = rows_of(method, 1e-3, of.strengths[0])
    assert (first["deviation"] > 0) == (of.trains != "head")
    assert [(row["method"], row["strength"]) for row in wise] == [(of.wise, a) for a in ALPHAS if of.wise]
    for row in wise:
        assert row["base"] == of.strengths[0]
        assert row["deviation"] == pytest.approx(row["strength"] * first["deviation"], rel=1e-3)
    if method == "PGM":
        tensors = sum(1 for _ in task.start.encoder.parameters())
        assert first["deviation"] <= of.strengths[0] * math.sqrt(tensors) * (1 + 1e-5)
    assert all(map(torch.equal, task.start.parameters(), before))


def test_it_learns_and_the_anchor_holds(rows_of):
    free = rows_of("AdamW", 3e-3, 0.0)[0]
    assert free["id"] > rows_of(ZERO_SHOT, 0.0, 0.0)[0]["id"] + 20
    for method, strength in (("L2-SP", 100.0), ("SPD", 3.0), ("PGM", 0.05), ("FTP", 1.0)):
        assert rows_of(method, 3e-3, strength)[0]["deviation"] < 0.9 * free["deviation"], method


def test_lora_counts_what_would_be_merged(rows_of, task, monkeypatch):
    found = []
    finetune = run.finetune
    monkeypatch.setattr(run, "finetune", lambda *args: found.append(finetune(*args)) or found[-1])
    row = rows_of("LoRA, AdamW", 1e-2, 0.0)[0]
    merged = found[0].encoder.merge_and_unload()
    assert run.deviation(Classifier(merged, 32), task.start) == pytest.approx(row["deviation"], rel=1e-4)


def test_parse_and_draw():
    """What is near neutral or comes twice is dropped; parts are balanced, and no source is in two of them."""
    lines = "1_1\t-0.9\tbad\tindeed\r\n1_2\t0.4\tmeh\r\n2_1\t2\tgood\r\n2_2\t1.5\tgood"
    assert data.parse(lines) == [data.Sentence("bad\tindeed", False, "1"), data.Sentence("good", True, "2")]
    sentences = [data.Sentence(f"{k}", k % 3 == 0, f"{k // 4}") for k in range(400)]
    for seed in range(3):
        parts = data.draw(sentences, (40, 20, 30), seed)
        assert [sum(s.positive for s in part) for part in parts] == [20, 10, 15]
        assert [len(part) for part in parts] == [40, 20, 30]
        sources = [{s.source for s in part} for part in parts]
        assert not sources[0] & sources[1] | sources[0] & sources[2] | sources[1] & sources[2]
    assert data.draw(sentences, (40,), 0) != data.draw(sentences, (40,), 1)
    with pytest.raises(ValueError, match="too few sentences"):
        data.draw(sentences, (40, 400), 0)


def test_batches_take_every_sentence_once_an_epoch():
    tokens = [[1] * (1 + k % 13) for k in range(64)]
    picks = batches(tokens, 8, seed=0)
    epochs = [[next(picks) for _ in range(8)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == list(range(64))
    assert epochs[0][0].tolist() != epochs[1][0].tolist()
    ids, mask = padded([tokens[12], tokens[0]])
    assert ids.tolist() == [[1] * 13, [1] + [0] * 12]
    assert mask.sum(1).tolist() == [13, 1]


def test_the_whole_pipeline_goes_on_where_it_was(task, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "task_of", lambda *_: task)
    monkeypatch.setattr(
        "examples.emoji.run.ProcessPoolExecutor", lambda workers, context, initializer: ThreadPoolExecutor(workers)
    )
    grid = run.settings(2, quick=True)
    assert len(grid) == 2 * (1 + len(METHODS))
    first = run.collect(grid[: len(METHODS)], DOMAINS[0], 1, tmp_path, 1)
    rows = run.collect(grid, DOMAINS[0], 1, tmp_path, 1)
    assert rows[: len(first)] == first
    monkeypatch.setattr(run, "rows_of", pytest.fail)  # all is known
    assert run.collect(grid, DOMAINS[0], 1, tmp_path, 1) == rows

    text = report.write(rows, [], DOMAINS[0], tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"sentiment.md", "sentiment-id-ood.png"}
    grid_of = text.split("## The whole grid")[1]
    for name in (ZERO_SHOT, *METHODS, "WiSE-FT", "WISE-SPD"):
        assert f"| {name} " in grid_of


def test_the_choice_is_by_validation_alone():
    """And what is chosen is repeated at further seeds; of WiSE-FT, the run that it goes on from."""
    rows = []
    for seed in range(3):
        for method, lr, strength, base, val, ood in (
            (ZERO_SHOT, 0.0, 0.0, 0.0, 60, 50),
            ("AdamW", 2e-4, 0.0, 0.0, 70, 40),
            ("AdamW", 8e-4, 0.0, 0.0, 60, 90),
            ("SPD", 2e-4, 1.0, 0.0, 80, 45 + seed),
            ("SPD", 2e-4, 2.0, 0.0, 75, 95),
            ("WISE-SPD", 2e-4, 0.5, 2.0, 90, 60),
        ):
            rows.append({
                "method": method, "lr": lr, "strength": strength, "base": base, "seed": seed, "val": val, "id": val,
                "ood": ood, "deviation": 1.0,
            })  # fmt: skip
    runs = report.by_config(rows)
    best = report.chosen(runs)
    assert best["SPD"] == Config("SPD", 2e-4, 1.0)
    assert report.differences(runs, best, "SPD")["OOD over AdamW"].startswith("+6.0 [+")
    repeated = run.repeats(rows, range(3, 5))
    assert [(s.method, s.lr, s.strength) for s in repeated if s.seed == 4] == [
        (ZERO_SHOT, 0.0, 0.0), ("AdamW", 2e-4, 0.0), ("SPD", 2e-4, 1.0), ("SPD", 2e-4, 2.0), ("AdamW", 8e-4, 0.0),
    ]  # fmt: skip
