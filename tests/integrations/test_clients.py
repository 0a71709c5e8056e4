"""Every client trains with the real library: SPD holds it nearer than AdamW, and what is resumed has the same bits."""

import importlib
import sys

import pytest
import torch

from . import OF_LIBRARIES

# Each client, and the library without which it is skipped.
LIBRARIES = {
    "hf_trainer": "transformers",
    "peft_lora": "peft",
    "accelerate_loop": "accelerate",
    "timm_vit": "timm",
    "lightning_module": "lightning",
    "lightning_cli": "jsonargparse",
    "trl_sft": "trl",
}

pytestmark = OF_LIBRARIES


@pytest.fixture
def client(tmp_path):
    """From the name of a client to its `main`, which gets a folder if it asks for one."""

    def main_of(name):
        pytest.importorskip(LIBRARIES[name], exc_type=ImportError)
        main = importlib.import_module(f"examples.clients.{name}").main
        folder = [tmp_path] if "folder" in main.__annotations__ else []

        def run(**options):
            if state := sys.modules.get("accelerate.state"):  # it keeps the precision of its first use
                state.AcceleratorState._reset_state(reset_partial_state=True)
                state.GradientState._reset_state()
            return main(*folder, **options)

        return run

    return main_of


def state_of(outcome):
    """Weights and the optimizer's state dict, with each tensor as its dtype and bytes."""

    def bits(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        if isinstance(value, dict):
            return {key: bits(of) for key, of in value.items()}
        return [bits(of) for of in value] if isinstance(value, list | tuple) else value

    return bits(outcome.model.state_dict()), bits(outcome.optimizer.state_dict())


@pytest.mark.parametrize("name", LIBRARIES)
def test_it_trains_and_spd_holds_it_nearer(client, name):
    main = client(name)
    free, held = main(method="none"), main(method="spd", strength=4.0)
    for outcome in (free, held):
        assert outcome.after < 0.95 * outcome.before
        assert all(torch.isfinite(param).all() for param in outcome.model.parameters())
    assert 0 < held.deviation < 0.95 * free.deviation


@pytest.mark.parametrize(
    ("name", "options", "checkpoint"),
    [
        ("hf_trainer", {}, "checkpoint-15"),
        ("hf_trainer", {"by_trainer": True}, "checkpoint-15"),
        ("accelerate_loop", {}, "epoch-5"),
        ("accelerate_loop", {"precision": "bf16"}, "epoch-5"),
        ("lightning_module", {}, "epoch=5.ckpt"),
        ("lightning_module", {"precision": "bf16-mixed"}, "epoch=5.ckpt"),
    ],
)
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(client, tmp_path, name, options, checkpoint):
    """The resumed one begins with other weights, so that the anchors too must be those of the checkpoint."""
    main = client(name)
    whole = main(**options)
    resumed = main(**options, seed=1, resume=tmp_path / checkpoint)
    assert any(not torch.equal(whole.start[key], resumed.start[key]) for key in whole.start)
    assert state_of(resumed) == state_of(whole)
    anchors = [of["anchor"] for of in resumed.optimizer.state_dict()["state"].values() if "anchor" in of]
    assert len(anchors) >= len(whole.start)
    assert all(any(torch.equal(anchor, start) for anchor in anchors) for start in whole.start.values())
    assert state_of(main(**options, seed=1)) != state_of(whole)


def test_trainer_without_anchors_in_the_checkpoint(client, tmp_path):
    """An optimizer that is given keeps its anchors; one that Trainer makes on resuming has those of the checkpoint's
    weights, which are not the pre-trained ones."""
    main = client("hf_trainer")
    for by_trainer in (False, True):
        whole = main(by_trainer=by_trainer, save_anchors=False)
        resumed = main(by_trainer=by_trainer, save_anchors=False, resume=tmp_path / "checkpoint-15")
        assert (state_of(resumed) == state_of(whole)) == (not by_trainer)


@pytest.mark.parametrize("by_trainer", [False, True])
def test_trainer_leads_the_learning_rate_and_keeps_names(client, by_trainer):
    outcome = client("hf_trainer")(by_trainer=by_trainer)
    assert {group["lr"] for group in outcome.optimizer.param_groups} == {0.0}  # a linear schedule, at its end
    told = outcome.optimizer.optimizer.telemetry()
    assert set(told) == {name for name, _ in outcome.model.named_parameters()}
    assert sum(of.selections for of in told.values()) > 0


def test_accelerate_trains_in_bfloat16(client):
    """Autocast changes the gradients; weights, moments and anchors stay float32."""
    main = client("accelerate_loop")
    mixed = main(precision="bf16")
    assert state_of(mixed) != state_of(main())
    tensors = [*mixed.model.parameters(), *(t for of in mixed.optimizer.state.values() for t in of.values())]
    assert {t.dtype for t in tensors} == {torch.float32}


def test_lora_alone_trains_without_anchors_and_merges(client):
    outcome = client("peft_lora")()
    peft_lora = importlib.import_module("examples.clients.peft_lora")
    torch.manual_seed(0)
    base = peft_lora.LlamaForCausalLM(peft_lora.CONFIG)
    assert set(outcome.start) == {name for name, _ in outcome.model.named_parameters() if "lora_" in name}
    assert all("anchor" not in of for of in outcome.optimizer.state_dict()["state"].values())
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in outcome.model.state_dict().items()
        if "lora_" not in name
    }
    assert set(frozen) == set(base.state_dict())
    assert all(torch.equal(frozen[name], value) for name, value in base.state_dict().items())

    tokens = torch.arange(24)[None]
    adapted = outcome.model.eval()(input_ids=tokens).logits
    merged = outcome.model.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(merged(input_ids=tokens).logits, adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged(input_ids=tokens).logits, base(input_ids=tokens).logits, atol=1e-2)


def test_timm_makes_its_own_groups_of_ours(client):
    optimizer = client("timm_vit")().optimizer
    assert type(optimizer).__name__ == "AdamSPD"
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert min(scales) < 0.5
    assert max(scales) == 1
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-5 * group["lr_scale"])  # the schedule's last, scaled by depth
        assert group["method"] == ("none" if group["param_names"][0].startswith("head.") else "spd")
        assert all((param.ndim > 1) >= (group["weight_decay"] > 0) for param in group["params"])
