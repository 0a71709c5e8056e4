"""The callbacks with the real trainers: radii come from held-out data alone, figures reach the logger, WiSE-FT is the
formula, and what is resumed has the same bits."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import robustft_kernels as rft
from robustft_kernels.callbacks import hold_out

from .callback_runs import (
    BATCH,
    STEPS,
    TPGM,
    TRAINERS,
    Examples,
    Module,
    WithLoss,
    hf,
    lightning,
    lit,
    spd,
    telemetry,
    tpgm,
    train,
    transformers,
    watched,
    wise,
)

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def parts():
    """96 examples to train on, six steps an epoch, and 32 held out."""
    return hold_out(Examples(128), 0.25)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(("every", "steps"), [(5, [5, 10]), ("evaluation", [4, 8, 12]), ("end", [12])])
def test_radii_are_those_of_tpgm_by_hand(kind, every, steps, parts, tmp_path):
    """At the right optimizer steps, each of which accumulates two batches, and on the held-out batches in their
    order."""
    rest, held_out = parts
    calls = []
    run = train(kind, tmp_path, watched(tpgm(held_out, every), calls), data=rest, every=4)
    assert [step for step, _, _ in calls] == steps

    net = WithLoss()
    net.load_state_dict(run.start)
    by_hand = rft.TPGM(net, lr=TPGM["lr"], exclude=TPGM["exclude"])
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [[held_out[k] for k in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
    batches = [torch.utils.data.default_collate(batch) for batch in batches]
    for _, before, after in calls:
        net.load_state_dict(before)
        by_hand.step(lambda batch: net(**batch)["loss"], batches, TPGM["steps"])
        assert same(dict(net.named_parameters()), after)
        assert not same(before, after)
    assert same(by_hand.radii, run.tpgm.radii)
    if every == "end":
        assert same(dict(run.net.named_parameters()), calls[-1][2])


@pytest.mark.parametrize("kind", TRAINERS)
def test_radii_depend_on_held_out_data_and_not_on_that_of_evaluation(kind, parts, tmp_path):
    rest, held_out = parts
    run = train(kind, tmp_path, tpgm(held_out), data=rest, every=4)
    for options, as_before in (({"evaluation": Examples(24, shift=1)}, True), ({"held": Examples(24, shift=1)}, False)):
        maker = tpgm(options.pop("held", held_out))
        other = train(kind, tmp_path, maker, data=rest, every=4, **options)
        assert (other.bits() == run.bits()) == as_before
        assert same(other.tpgm.radii, run.tpgm.radii) == as_before


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_evaluation_sees_and_a_checkpoint_has_the_projected_weights(kind, parts, tmp_path):
    rest, held_out = parts
    calls = []
    run = train(kind, tmp_path, watched(tpgm(held_out), calls), data=rest, every=6)
    (_, _, after), *_ = calls
    net = WithLoss()
    net.load_state_dict(after)
    evaluation = Examples(24)
    with torch.no_grad():
        expected = float(net.eval()(evaluation.inputs, evaluation.labels)["loss"])
    assert next(of["eval_loss"] for of in run.logged if "eval_loss" in of) == pytest.approx(expected, rel=1e-5)
    if kind == "huggingface":
        assert same(load_file(tmp_path / "checkpoint-6" / "model.safetensors"), after)


@pytest.mark.parametrize("kind", TRAINERS)
def test_what_does_not_ask_for_tpgm_at_evaluation_trains_the_same_with_it(kind, parts, tmp_path):
    rest, held_out = parts
    rare, often = (train(kind, tmp_path, tpgm(held_out, 5), data=rest, every=every, dropout=0.0) for every in (4, 3))
    assert rare.bits() == often.bits()
    assert rare.bits() != train(kind, tmp_path, data=rest, dropout=0.0).bits()


@pytest.mark.parametrize("kind", TRAINERS)
def test_telemetry_changes_no_bit(kind, tmp_path):
    """The model of Trainer has dropout, so the random states stay too."""
    plain = train(kind, tmp_path, every=4)
    assert train(kind, tmp_path, telemetry(by_parameter=True), every=4).bits() == plain.bits()


@pytest.mark.parametrize("kind", TRAINERS)
def test_figures_reach_the_logger_every_second_step(kind, parts, tmp_path):
    rest, held_out = parts
    run = train(kind, tmp_path, telemetry(by_parameter=True), tpgm(held_out, 4), data=rest)
    told = run.optimizer.telemetry()
    logged = [of for of in run.logged if "robustft/deviation" in of]
    assert [round(of["step"]) for of in logged] == [step - (kind == "lightning") for step in range(2, STEPS + 1, 2)]
    last = logged[-1]
    assert last["robustft/deviation"] == pytest.approx(
        sum(of.deviation**2 for of in told.values() if of.deviation == of.deviation) ** 0.5
    )
    assert last["robustft/selected"] == sum(of.selected > 0 for of in told.values())
    for name, of in told.items():
        assert last[f"robustft/alpha/{name}"] == pytest.approx(of.alpha)
    assert any(of["robustft/selected"] > 0 for of in logged)

    learned = [of for of in run.logged if "tpgm/deviation" in of]
    assert len(learned) == STEPS // 2
    names = run.tpgm.names
    params = dict(run.net.named_parameters())
    sizes = rft.deviation([params[name] for name in names], [run.start[name] for name in names])
    assert learned[-1]["tpgm/deviation"] == pytest.approx(float(sizes.square().sum().sqrt()), rel=1e-5)
    assert learned[-1]["tpgm/selected"] == sum(float(of) < 1 for of in run.tpgm.alphas.values()) > 0
    assert not any(key.startswith("tpgm/radius") for of in learned for key in of)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_progress_bar_shows_deviation_and_selected(kind, parts, tmp_path, capsys):
    rest, held_out = parts
    options = {"disable_tqdm": False} if kind == "huggingface" else {}
    run = train(kind, tmp_path, telemetry(), tpgm(held_out, 4), data=rest, **options)
    keys = [f"{prefix}/{key}" for prefix in ("robustft", "tpgm") for key in ("deviation", "selected")]
    if kind == "huggingface":
        bars = capsys.readouterr().err
        assert all(f"{key}=" in bars for key in keys)
        assert "selected=4/4" in bars or "/4" in bars
    else:
        assert set(keys) == set(run.trainer.progress_bar_metrics) & {f"{key}" for of in run.logged for key in of}


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("given", [False, True])
def test_wise_ft_at_the_end_is_the_formula_and_is_what_is_saved_then(kind, given, parts, tmp_path):
    alpha = 0.3
    fine = train(kind, tmp_path, data=parts[0])
    pretrained, exclude = fine.start, {"exclude": "head"}
    run = train(kind, tmp_path, wise(alpha, pretrained, **exclude) if given else wise(alpha), data=parts[0])
    expected = rft.wise_ft(pretrained, fine.net, alpha, **exclude)
    assert same(run.net.state_dict(), expected)
    assert not same(fine.net.state_dict(), expected)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(expected[name], fine.net.state_dict()[name])
    if kind == "huggingface":
        run.trainer.save_model(str(tmp_path / "final"))
        saved, checkpoint = (load_file(tmp_path / of / "model.safetensors") for of in ("final", f"checkpoint-{STEPS}"))
    else:
        run.trainer.save_checkpoint(tmp_path / "final.ckpt")
        saved, checkpoint = (
            torch.load(tmp_path / of, weights_only=True)["state_dict"] for of in ("final.ckpt", f"step={STEPS}.ckpt")
        )
    assert same(saved, expected)
    assert same(checkpoint, fine.net.state_dict())


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("every", [3, "evaluation", "end"])
def test_a_resumed_run_has_the_bits_of_the_whole_one(kind, every, parts, tmp_path):
    """It begins with other weights, so that the anchors of radii and of the optimizer must be the checkpoint's."""
    rest, held_out = parts
    makers = tpgm(held_out, every), telemetry(), wise(0.5)
    whole = train(kind, tmp_path, *makers, data=rest, every=4)
    resumed = train(kind, tmp_path, *makers, data=rest, every=4, seed=1, resume=6)
    assert not same(whole.start, resumed.start)
    assert resumed.bits() == whole.bits()
    assert same(resumed.tpgm.radii, whole.tpgm.radii)
    assert same(resumed.tpgm.state_dict()["anchors"], {name: whole.start[name] for name in whole.tpgm.names})
    late = [[of for of in run.logged if of["step"] >= 7 and any("/" in key for key in of)] for run in (whole, resumed)]
    assert late[0] == late[1] != []
    assert train(kind, tmp_path, *makers, data=rest, every=4, seed=1).bits() != whole.bits()


@pytest.mark.parametrize("kind", TRAINERS)
def test_without_anchors_in_the_checkpoint_they_are_the_weights_from_before_it_was_loaded(kind, parts, tmp_path):
    rest, held_out = parts
    maker = tpgm(held_out, 3, save_anchors=False)
    whole, resumed = (train(kind, tmp_path, maker, data=rest, resume=resume) for resume in (None, 6))
    assert resumed.bits() == whole.bits()
    assert resumed.bits() != train(kind, tmp_path, maker, data=rest, seed=1, resume=6).bits()


def test_trainer_refuses_radii_of_another_checkpoint(parts, tmp_path):
    rest, held_out = parts
    whole = train("huggingface", tmp_path, tpgm(held_out, 3), data=rest)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "checkpoint-6" / hf.FILE).replace(elsewhere / hf.FILE)
    (tmp_path / "checkpoint-12" / hf.FILE).replace(tmp_path / "checkpoint-6" / hf.FILE)
    with pytest.raises(ValueError, match="belongs to other weights"):
        train("huggingface", tmp_path, tpgm(held_out, 3), data=rest, resume=6)
    resumed = train("huggingface", tmp_path, tpgm(held_out, 3, resume_from=elsewhere), data=rest, resume=6)
    assert resumed.bits() == whole.bits()
    (tmp_path / "checkpoint-6" / hf.FILE).unlink()
    with pytest.raises(FileNotFoundError, match="resume_from="):
        train("huggingface", tmp_path, tpgm(held_out, 3), data=rest, resume=6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_held_out_data_of_another_size_is_refused_on_resuming(kind, parts, tmp_path):
    rest, held_out = parts
    train(kind, tmp_path, tpgm(held_out, 3), data=rest)
    with pytest.raises(ValueError, match="the same held_out"):
        train(kind, tmp_path, tpgm(held_out, 3, batch_size=5), data=rest, resume=6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_data_that_is_trained_or_evaluated_on_is_refused(kind, parts, tmp_path):
    rest, held_out = parts
    for options in ({"data": held_out.dataset}, {"data": rest, "evaluation": held_out}):
        with pytest.raises(ValueError, match=r"held_out shares examples with .*(train|eval|valid).*hold_out"):
            train(kind, tmp_path, tpgm(held_out), every=4, **options)
    with pytest.raises(ValueError, match="every='evaluation', but there is none"):
        train(kind, tmp_path, tpgm(held_out), data=rest)


@pytest.mark.parametrize("kind", TRAINERS)
def test_optimizers_that_are_not_ours_are_answered_when_training_begins(kind, parts, tmp_path):
    def adamw(net):
        return torch.optim.AdamW(net.parameters(), lr=1e-2)

    with pytest.raises(TypeError, match=r"AdamW has no telemetry.*Anchored"):
        train(kind, tmp_path, telemetry(), make=adamw)
    with pytest.raises(ValueError, match="give pretrained="):
        train(kind, tmp_path, wise(0.5), make=adamw)
    with pytest.raises(ValueError, match="pretrained lacks"):
        train(kind, tmp_path, wise(0.5, {"head.weight": torch.zeros(3, 32)}))
    rest, held_out = parts  # TPGM needs none of ours
    run = train(kind, tmp_path, tpgm(held_out, 3), data=rest, make=adamw)
    assert any(float(radius) > 1e-3 for radius in run.tpgm.radii.values())


def test_around_another_optimizer_there_are_telemetry_and_anchors(tmp_path):
    def around(net):
        return rft.Anchored(torch.optim.SGD(net.named_parameters(), lr=0.1), "spd", strength=1.0)

    fine = train("lightning", tmp_path, make=around)
    run = train("lightning", tmp_path, telemetry(), wise(0.5), make=around)
    assert any("robustft/deviation" in of for of in run.logged)
    assert same(run.net.state_dict(), rft.wise_ft(run.start, fine.net, 0.5))


def test_trainer_is_needed_and_model_init_refused(parts, tmp_path):
    rest, held_out = parts
    with pytest.raises(TypeError, match=r"trainer\.add_callback"):
        hf.TelemetryCallback(WithLoss())
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = transformers.Trainer(args=arguments, train_dataset=rest, model_init=lambda: WithLoss())
    for make in (lambda: hf.TPGMCallback(trainer, held_out, every=3), lambda: hf.WiSECallback(trainer, 0.5)):
        with pytest.raises(ValueError, match="give Trainer the model"):
            make()


def test_lightning_mutes_what_training_step_logs_on_held_out_data(parts, tmp_path):
    """The losses in the log are those of training batches; manual optimization needs a loss function."""
    rest, held_out = parts
    plain, run = (train("lightning", tmp_path / name, *makers, data=rest) for name, makers in
                  (("a", []), ("b", [tpgm(held_out, "end")])))  # fmt: skip
    losses = [[of["loss"] for of in each.logged if "loss" in of] for each in (plain, run)]
    assert losses[0] == losses[1] != []

    class Manual(Module):
        automatic_optimization = False

    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[lit.TPGMCallback(held_out, every=3)], enable_model_summary=False, max_steps=1, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="give loss_fn="):
        trainer.fit(Manual(spd), DataLoader(rest, BATCH), DataLoader(Examples(24), BATCH))


def test_lightning_reads_the_device_once_a_logged_step(tmp_path, monkeypatch):
    calls = []
    told = lit.TelemetryCallback.told
    monkeypatch.setattr(
        lit.TelemetryCallback, "told", lambda of, trainer: calls.append(trainer.global_step) or told(of, trainer)
    )
    train("lightning", tmp_path, telemetry())
    assert calls == [0, *range(2, STEPS + 1, 2)]  # at 0, whether there is any


@pytest.mark.parametrize(("fn", "sanity"), [("fit", True), ("validate", False)])
def test_lightning_learns_in_no_other_validation(fn, sanity, parts):
    callback = lit.TPGMCallback(parts[1])
    callback.learner.learn = None  # an error, if it is called
    state = SimpleNamespace(fn=fn)
    callback.on_validation_start(SimpleNamespace(state=state, sanity_checking=sanity, global_step=4), None)


@pytest.mark.parametrize("section", ["Hugging Face Trainer", "Lightning"])
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
def test_the_examples_of_the_page_run(section, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()
    (code,) = re.findall(rf"^## {section}\n.*?```py\n(.*?)```", page, flags=re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, section, "exec"), {"__name__": "page"})
    assert list(tmp_path.glob("final*"))
