"""Our optimizers by configuration, in literals: timm's registry, Lightning's CLI, TRL, and the recipes of
docs/clients.md for programs that are not installed here."""

import ast
import importlib
import re
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import robustft_kernels as rft

from . import OF_LIBRARIES

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"

pytestmark = OF_LIBRARIES


def small():
    return nn.ModuleDict({"body": nn.Linear(4, 5), "norm": nn.LayerNorm(5), "head": nn.Linear(5, 2)})


def step(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(torch.isfinite(p).all() for group in optimizer.param_groups for p in group["params"])


@pytest.fixture
def timm_optim():
    optim = pytest.importorskip("timm.optim", exc_type=ImportError)
    importlib.import_module("robustft_kernels.timm")
    return optim


def test_timm_has_every_optimizer(timm_optim):
    from robustft_kernels.optim.for_model import CLASSES

    for name, of in CLASSES.items():
        assert name.lower() in timm_optim.list_optimizers()
        radius = {"radius": 1.0} if name.endswith("PGM") else {}
        optimizer = timm_optim.create_optimizer_v2(small(), name, lr=1e-2, weight_decay=0.1, **radius)
        assert type(optimizer) is of
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.1]
        if issubclass(of, rft.AnchoredSGD):
            assert optimizer.param_groups[0]["momentum"] == 0.9
        step(optimizer)


def test_timm_by_the_arguments_of_its_scripts(timm_optim):
    """As train.py --opt adamspd --opt-betas 0.9 0.99 --opt-kwargs strength=0.5 makes it."""
    arguments = Namespace(
        opt="adamspd", lr=1e-3, weight_decay=0.05, momentum=0.9, opt_betas=[0.9, 0.99], opt_eps=1e-6,
        opt_args={"strength": 0.5, "anchor_dtype": "bfloat16"},
    )  # fmt: skip
    optimizer = timm_optim.create_optimizer(arguments, small())
    assert {(group["strength"], group["eps"], *group["betas"]) for group in optimizer.param_groups} == {
        (0.5, 1e-6, 0.9, 0.99)
    }
    step(optimizer)
    with pytest.raises(TypeError, match="AdamSPD has no argument 'foreach'"):
        timm_optim.create_optimizer_v2(small(), "adamspd", foreach=True)


@pytest.mark.parametrize("groups", [False, True], ids=["timm's groups", "a user's"])
def test_timm_with_names_and_a_free_head(timm_optim, groups):
    model = small()
    rest, head = [*model["body"].parameters(), *model["norm"].parameters()], list(model["head"].parameters())
    given = [{"params": rest + head, "lr": 0.5}] if groups else model
    optimizer = timm_optim.create_optimizer_v2(given, "adamspd", lr=0.5, weight_decay=0.1, model=model, head="head")
    methods = {name: of["method"] for of in optimizer.param_groups for name in of["param_names"]}
    assert methods == {name: "none" if name.startswith("head.") else "spd" for name, _ in model.named_parameters()}
    step(optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "head"}, "head is known by the names of a model"),
        ({"head": "tail", "model": small()}, "head names 'tail', under which model has no parameter"),
        ({"model": small()}, "params has a parameter that is not among those of model"),
    ],
)
def test_timm_what_is_wrong_is_named(timm_optim, options, message):
    with pytest.raises(ValueError, match=message):
        timm_optim.create_optimizer_v2(small(), "adamspd", lr=0.5, **options)


LITERALS = """
lr: 1.0e-3
betas: [0.9, 0.99]
weight_decay: 0.01
method: project
norm: mars
radius: 0.5
anchor: zero
anchor_dtype: bfloat16
state_dtype: bfloat16
radius_betas: [0.9, 0.99]
max_grad_norm: 1
seed: 3
stochastic_rounding: true
save_anchors: digest
backend: reference
"""


def test_lightning_cli_makes_a_class_of_literals(tmp_path):
    """`optimizer: {class_path: ..., init_args: ...}`, which the CLI holds to the annotations of the constructor."""
    lightning = pytest.importorskip("lightning", exc_type=ImportError)
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    class Plain(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = small()

    literals = "".join(f"    {line}\n" for line in LITERALS.strip().splitlines())
    config = (
        "seed_everything: 0\ntrainer: {logger: false}\n"
        f"optimizer:\n  class_path: robustft_kernels.AnchoredAdamW\n  init_args:\n{literals}"
    )
    (tmp_path / "config.yaml").write_text(config)
    arguments = ["--config", str(tmp_path / "config.yaml")]
    optimizer = LightningCLI(Plain, args=arguments, run=False, save_config_callback=None).model.configure_optimizers()
    assert type(optimizer) is rft.AnchoredAdamW
    (group,) = optimizer.param_groups
    assert (group["method"], group["radius"], group["anchor"], group["state_dtype"]) == (
        "project", 0.5, "zero", torch.bfloat16,
    )  # fmt: skip
    step(optimizer)


def test_lightning_cli_makes_a_function_of_the_model(tmp_path):
    pytest.importorskip("jsonargparse")
    client = importlib.import_module("examples.clients.lightning_cli")
    optimizer = client.main(tmp_path).optimizer
    assert [group["method"] for group in optimizer.param_groups] == ["spd", "none"]
    assert all(name.startswith("net.head.") for name in optimizer.param_groups[1]["param_names"])


def test_trl_holds_the_adapters_that_it_adds(tmp_path):
    pytest.importorskip("trl")
    outcome = importlib.import_module("examples.clients.trl_sft").main(tmp_path, lora=True)
    (group,) = outcome.optimizer.param_groups
    assert group["anchor"] == "zero"
    assert set(group["param_names"]) == set(outcome.start)
    assert all("lora_" in name for name in group["param_names"])
    assert outcome.after < outcome.before
    assert sum(of.selections for of in outcome.optimizer.optimizer.telemetry().values()) > 0


@pytest.mark.parametrize("way", ["made by Trainer", "with a file", "given"])
def test_trainer_resumed_from_the_model_alone(tmp_path, way):
    """Its checkpoint has no anchors then. Those of a file are right all the same, and so are those of an optimizer that
    was made before the checkpoint was read."""
    pytest.importorskip("transformers")
    save = pytest.importorskip("safetensors.torch").save_file
    hf_trainer = importlib.import_module("examples.clients.hf_trainer")
    options = {"by_trainer": way != "given", "save_only_model": True}
    pretrained = hf_trainer.main(tmp_path, **options).start
    save(pretrained, tmp_path / "model.safetensors")
    if way == "with a file":
        options["anchor"] = str(tmp_path / "model.safetensors")
    own = hf_trainer.main(tmp_path, **options, resume=tmp_path / "checkpoint-15").optimizer.optimizer
    (group, _) = own.param_groups
    kept = dict(zip(group["param_names"], (own.state[param]["anchor"] for param in group["params"]), strict=True))
    assert all(torch.equal(kept[name], pretrained[name]) for name in pretrained) == (way != "made by Trainer")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)


def test_recipe_of_kohya():
    """Each key=value of `--optimizer_args` goes through ast.literal_eval."""
    (block,) = [of for of in blocks("sh") if "--optimizer_type" in of]
    words = shlex.split(block.replace("\\\n", " "))
    name = words[words.index("--optimizer_type") + 1]
    options = words[words.index("--optimizer_args") + 1 :]
    module, _, of = name.rpartition(".")
    made = getattr(importlib.import_module(module), of)
    literals = {key: ast.literal_eval(value) for key, value in (option.split("=") for option in options)}
    assert {"betas", "anchor"} <= set(literals)
    step(made([{"params": list(small().parameters()), "lr": 1e-4}], lr=1e-4, **literals))


def test_recipe_of_nemo():
    """Its factory gets parameters without names, and what the file has beside `_target_`."""
    yaml = pytest.importorskip("yaml")
    (block,) = [of for of in blocks("yaml") if "_target_" in of]
    options = yaml.safe_load(block)["optimizer"]
    module, _, of = options.pop("_target_").rpartition(".")
    step(getattr(importlib.import_module(module), of)(params=list(small().parameters()), **options))
