"""Whole iterations of fine-tuning, forward and backward included, and whole runs of TPGM: what a user sees of it."""

import copy
from collections.abc import Callable
from itertools import repeat

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import robustft_kernels as rft
import tests.integrations  # noqa: F401, so that timm and transformers can be imported beside a CPU build of torch

from .contenders import BASELINE, EAGER, LR, METHODS, TORCH, Contender, ours
from .contest import Work
from .loops import LoopSPD

Loss = Callable[[nn.Module], Tensor]
# Steps of a run: in training, and on radii. They add 17% if a step on radii costs as much as one in training.
TRAIN, PROJECT = 6, 1
ROUNDS = 2  # at least
LONG = pytest.mark.once("an iteration is long beside its step, and README quotes that of ViT-B/16")
FROM_ZERO = {  # adapters are anchored there
    "AdamSPD, eager": Contender(lambda params: LoopSPD(params, LR, [None] * len(params))),
    "AdamSPD": ours("spd", anchor="zero"),
}


def iteration(model: nn.Module, contender: Contender, loss: Loss) -> Callable[[], None]:
    optimizer = contender.make([p for p in model.parameters() if p.requires_grad])

    def run() -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def vit(ring) -> tuple[nn.Module, Loss, int]:
    """timm's ViT-B/16 with random weights, its loss on random images, and how many images."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    images = {"cpu": 2, "cuda": 64}[ring.device.type]
    smaller = {"img_size": 32, "depth": 1} if ring.smoke else {}
    model = timm.create_model("vit_base_patch16_224", **smaller).to(ring.device)
    inputs = torch.randn(images, 3, *model.patch_embed.img_size, device=ring.device)
    labels = torch.arange(images, device=ring.device)
    return model, lambda model: cross_entropy(autocast(ring, model, inputs), labels), images


def minilm(ring) -> tuple[nn.Module, Loss, int]:
    """MiniLM with its pre-trained weights and a head, its loss on random tokens, and how many tokens."""
    from examples.sentiment import model as sentiment

    try:
        encoder, _ = sentiment.minilm()
    except RuntimeError as error:
        pytest.skip(str(error))
    sentences = 2 if ring.smoke else {"cpu": 16, "cuda": 256}[ring.device.type]
    model = sentiment.Classifier(encoder, 384).to(ring.device)
    ids = torch.randint(1000, 30000, (sentences, sentiment.TOKENS), device=ring.device)
    labels = torch.arange(sentences, device=ring.device) % 2
    return model, lambda model: cross_entropy(autocast(ring, model, ids, ids > 0), labels), ids.numel()


def autocast(ring, model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.autocast(ring.device.type, torch.bfloat16, enabled=ring.device.type == "cuda"):
        logits: Tensor = model(*inputs)
    return logits.float()


@pytest.mark.parametrize(
    "model", ["ViT-B/16", pytest.param("MiniLM", marks=LONG), pytest.param("MiniLM, LoRA r=8", marks=LONG)]
)
def bench_end_to_end(ring, model):
    """Images or tokens a second of fine-tuning with AdamW, with the eager AdamSPD, and with ours."""
    network, loss, items = (vit if model == "ViT-B/16" else minilm)(ring)
    spd = {"AdamSPD, eager": EAGER["AdamSPD"], "AdamSPD": METHODS["AdamSPD"]}
    if "LoRA" in model:
        from examples.sentiment.methods import adapted

        adapted(network, "lora")
        spd = FROM_ZERO
    contenders = {BASELINE: TORCH[BASELINE], **spd}
    entrants = {name: Work(iteration(copy.deepcopy(network), of, loss)) for name, of in contenders.items()}
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    unit = "images" if model == "ViT-B/16" else "tokens"
    ring.contest(entrants, "AdamSPD", trained, least=ROUNDS, model=model, items=items, unit=unit)


@LONG
def bench_tpgm_run(ring):
    """Fine-tuning of MiniLM by AdamW, and the same followed by TPGM."""
    network, loss, _ = minilm(ring)
    train = iteration(network, TORCH[BASELINE], loss)
    learner = rft.TPGM(network, exclude="head")

    def fine_tune() -> None:
        for _ in repeat(None, TRAIN):
            train()

    def with_tpgm() -> None:
        fine_tune()
        learner.update(lambda _: loss(network), [0], PROJECT, progress=False)
        learner.project_()

    entrants = {"fine-tuning": Work(fine_tune), "with TPGM": Work(with_tpgm)}
    n = sum(p.numel() for p in network.parameters())
    told = {"model": "MiniLM", "steps": [TRAIN, PROJECT]}
    ring.contest(entrants, "with TPGM", n, baseline="fine-tuning", least=ROUNDS, **told)
