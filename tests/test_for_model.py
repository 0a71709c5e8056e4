"""Optimizers as functions of a model, and anchors whose names differ from the model's by one prefix."""

import pickle

import pytest
import torch
from torch import nn

import robustft_kernels as rft


def small():
    """A body under the prefix "bert.", and a head."""
    model = nn.Module()
    model.bert = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    model.classifier = nn.Linear(5, 2)
    return model


def grads(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def names_of(optimizer):
    return [group["param_names"] for group in optimizer.param_groups]


def test_the_head_is_free_and_all_have_names():
    model = small()
    optimizer = rft.for_model("AdamSPD", head="classifier", strength=0.5)(model, lr=1e-2)
    assert type(optimizer) is rft.AdamSPD
    body, head = optimizer.param_groups
    assert body["param_names"] == [f"bert.{k}.{of}" for k in (0, 1) for of in ("weight", "bias")]
    assert head["param_names"] == ["classifier.weight", "classifier.bias"]
    assert (body["method"], head["method"]) == ("spd", "none")
    assert body["strength"] == 0.5
    assert body["lr"] == head["lr"] == 1e-2
    grads(model)
    optimizer.step()
    assert "anchor" not in optimizer.state[model.classifier.weight]


def test_biases_and_vectors_have_no_decay():
    optimizer = rft.for_model("SGDFTP", head="classifier", head_options={"lr": 0.5}, weight_decay=0.1, lr=0.1)(small())
    assert names_of(optimizer) == [
        ["bert.0.weight"], ["bert.0.bias", "bert.1.weight", "bert.1.bias"], ["classifier.weight"], ["classifier.bias"],
    ]  # fmt: skip
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0, 0.1, 0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.5, 0.5]


def test_only_what_is_trained_is_taken():
    model = small()
    model.bert.requires_grad_(False)
    assert names_of(rft.for_model(head="classifier")(model)) == [["classifier.weight", "classifier.bias"]]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        rft.for_model()(model)


def test_a_call_has_the_last_word_and_copies_are_equal():
    made = rft.for_model("AdamFTP", lr=1e-3, k=0.5)
    assert pickle.loads(pickle.dumps(made)) == made
    assert made(small(), lr=2e-3).param_groups[0]["lr"] == 2e-3
    assert made(small()).param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rft.for_model("AdamSPT"), ValueError, "unknown optimizer 'AdamSPT': choose one of 'AdamFTP'"),
        (lambda: rft.for_model(params=[]), ValueError, "params come from the model"),
        (lambda: rft.for_model()(small().parameters()), TypeError, 'got parameters; with Trainer, .*"model": model'),
        (lambda: rft.for_model()(None), TypeError, "got a NoneType"),
        (lambda: rft.for_model(head="head")(small()), ValueError, "head names 'head', under which model has no"),
    ],
)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_every_optimizer_has_its_name():
    from robustft_kernels.optim.for_model import CLASSES

    public = {name for name in rft.__all__ if name.startswith(("Adam", "SGD", "AnchoredAdam", "AnchoredSGD"))}
    assert set(CLASSES) == public


def anchors_of(optimizer, model):
    grads(model)
    optimizer.step()
    return [optimizer.state[p]["anchor"] for p in model.bert.parameters()]


@pytest.mark.parametrize("way", ["the model's own", "of the base model", "of a model around it"])
def test_anchors_may_differ_by_one_prefix(tmp_path, way):
    """As a checkpoint of BertModel beside a BertForSequenceClassification. Its pooler is passed over."""
    save = pytest.importorskip("safetensors.torch").save_file
    model = small()
    base = {name: torch.randn_like(p) for name, p in model.bert.named_parameters()}
    before = {"the model's own": "bert.", "of the base model": "", "of a model around it": "model.bert."}[way]
    save(
        {**{before + name: of for name, of in base.items()}, "pooler.weight": torch.ones(3)},
        tmp_path / "model.safetensors",
    )
    optimizer = rft.for_model("AdamSPD", head="classifier", anchor=str(tmp_path))(model)
    assert all(map(torch.equal, anchors_of(optimizer, model), base.values()))


def test_two_prefixes_are_no_prefix():
    """What cannot be told is refused: two models in one file, or entries that lack one name."""
    model = small()
    base = dict(model.bert.named_parameters())
    twice = {f"{of}.bert.{name}": p.detach() for of in ("student", "teacher") for name, p in base.items()}
    one_less = {name: p.detach() for name, p in base.items() if name != "1.bias"}
    for spec in (twice, one_less):
        with pytest.raises(ValueError, match=r"the anchor mapping lacks .*bert\."):
            anchors_of(rft.for_model("AdamSPD", head="classifier", anchor=spec)(model), model)


def test_the_ways_in_which_trainers_call_it():
    """A class gets the keyword `model` in the place of groups. A factory is called, and then gets the model; with
    axolotl, its arguments too."""
    make, model = rft.for_model("AdamSPD", head="classifier", lr=0.5), small()
    for optimizer in (make(model), make()(model, model=model), make(model=model, lr=0.5), make()(model, {})):
        assert type(optimizer) is rft.AdamSPD
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
