"""Emoji as a small DomainNet: 1,594 things (identities), each drawn in six styles (domains), with a name and a kind.

The drawings come from five npm packages and are rendered here; nothing rendered is kept in the repository. Licences:
openmoji (the styles openmoji and openmoji-black, and the names) CC BY-SA 4.0; noto Apache-2.0; twemoji CC BY 4.0;
fluent-emoji-flat and fluent-emoji-high-contrast MIT.
"""

import io
import json
import shutil
import subprocess
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

OPENMOJI = "openmoji@17.0.0"
ICONIFY = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-contrast": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
STYLES = ("openmoji", "openmoji-black", *ICONIFY)
PIXELS = 64
MEMBERS = 12  # a kind with fewer is no class


@dataclass(frozen=True)
class Emoji:
    """images: (styles, identities, 3, pixels, pixels) uint8, on white; names: one text an identity, none twice.

    kinds: (identities,) int64, an index into `classes` ("animal mammal", "place building" ...), −1 for kinds too rare.
    """

    images: Tensor
    names: list[str]
    kinds: Tensor
    classes: list[str]


@dataclass(frozen=True)
class Split:
    """Identities (int64 indices), disjoint: for pre-training, fine-tuning, choosing hyper-parameters, testing."""

    pretrain: Tensor
    finetune: Tensor
    validate: Tensor
    test: Tensor


def split(kinds: Tensor, seed: int, finetune: int = 337, validate: int = 171) -> Split:
    """Half of all identities for pre-training, those of rare kinds among them; 337, 171 and the other 289 for the rest.

    Every kind is spread over the four parts in the same proportion.
    """
    shuffled = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))
    place = torch.empty(len(kinds))
    for kind in kinds.unique().tolist():
        members = shuffled[kinds[shuffled] == kind]
        offset = torch.rand((), generator=torch.Generator().manual_seed(seed * 1000 + kind + 1))
        place[members] = -1.0 if kind < 0 else (torch.arange(len(members)) + offset) / len(members)
    half = len(kinds) // 2
    parts = [half, finetune, validate, len(kinds) - half - finetune - validate]
    return Split(*place.argsort(stable=True).split(parts))


def load(cache: Path) -> Emoji:
    """The rendered emoji, from `cache` or made there: a download of 11 MB, half a minute of rendering.

    Raises RuntimeError where npm or resvg-py is missing or fails, and says what to do.
    """
    file = cache / f"emoji-{PIXELS}.npz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        drawings, names, subgroups = collect(fetch(cache / "packages"))
        images = render([svg for style in STYLES for svg in drawings[style]])
        images = images.reshape(len(STYLES), len(names), 3, PIXELS, PIXELS)
        partial = file.with_suffix(".part.npz")
        np.savez_compressed(partial, images=images, names=names, subgroups=subgroups)
        partial.replace(file)
    with np.load(file) as stored:
        subgroups = stored["subgroups"].tolist()
        classes = sorted(name for name, members in Counter(subgroups).items() if members >= MEMBERS)
        kinds = torch.tensor([classes.index(name) if name in classes else -1 for name in subgroups])
        return Emoji(torch.from_numpy(stored["images"]), stored["names"].tolist(), kinds, classes)


def fetch(folder: Path) -> Path:
    """The packages' archives in `folder`, fetched by `npm pack` where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in (OPENMOJI, *ICONIFY.values()) if not archive(folder, package).exists()]
    if not missing:
        return folder
    if (npm := shutil.which("npm")) is None:
        raise RuntimeError(f"npm is needed (the packages npm or nodejs have it), or put what it packs into {folder}")
    print("npm pack", *missing, flush=True)
    run = subprocess.run([npm, "pack", "--silent", *missing], cwd=folder, capture_output=True, text=True)
    if run.returncode or not all(archive(folder, package).exists() for package in missing):
        raise RuntimeError(f"npm pack failed:\n{run.stdout}{run.stderr}")
    return folder


def archive(folder: Path, package: str) -> Path:
    return folder / f"{package.removeprefix('@').replace('/', '-').replace('@', '-')}.tgz"


def collect(folder: Path) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Of the emoji that all styles have, by code points: the SVG texts of every style, the names, the subgroups."""
    with tarfile.open(archive(folder, OPENMOJI)) as tar:
        listed = {key(entry["hexcode"]): entry for entry in json.loads(read(tar, "data/openmoji.json"))}
        drawings = {
            style: {key(member.name.split("/")[-1][:-4]): member for member in tar if f"/{part}/svg/" in member.name}
            for style, part in (("openmoji", "color"), ("openmoji-black", "black"))
        }
        chars, icons = {}, {}
        for style, package in ICONIFY.items():
            with tarfile.open(archive(folder, package)) as iconify:
                chars[style] = {key(c): name for c, name in json.loads(read(iconify, "chars.json")).items()}
                icons[style] = json.loads(read(iconify, "icons.json"))
        common = sorted(set(listed).intersection(*drawings.values(), *chars.values()))
        texts = {style: [read(tar, found[code]) for code in common] for style, found in drawings.items()}
    for style in ICONIFY:
        texts[style] = [svg(icons[style], chars[style][code]) for code in common]
    names = [listed[code]["annotation"] for code in common]
    return texts, names, [listed[code]["subgroups"].replace("-", " ") for code in common]


def key(hexcode: str) -> str:
    """Code points without the variation selector, which the packages write or leave out as they like."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def read(tar: tarfile.TarFile, member: str | tarfile.TarInfo) -> str:
    stream = tar.extractfile(f"package/{member}" if isinstance(member, str) else member)
    assert stream is not None  # a file, not a folder
    return stream.read().decode()


def svg(icons: dict[str, Any], name: str) -> str:
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def render(svgs: list[str]) -> np.ndarray:
    """(n, 3, PIXELS, PIXELS) uint8: each drawing scaled to fit and centred, on white."""
    try:
        from PIL import Image
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise RuntimeError(
            f"{error.name} is missing: pip install --no-deps -r examples/emoji/requirements.txt"
        ) from error

    def one(text: str) -> np.ndarray:
        png = svg_to_bytes(svg_string=text, background="white", skip_system_fonts=True, width=PIXELS)
        image = Image.open(io.BytesIO(png)).convert("RGB")
        image.thumbnail((PIXELS, PIXELS))
        square = Image.new("RGB", (PIXELS, PIXELS), "white")
        square.paste(image, ((PIXELS - image.width) // 2, (PIXELS - image.height) // 2))
        return np.asarray(square).transpose(2, 0, 1)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return np.stack(list(tqdm(pool.map(one, svgs), total=len(svgs), desc="render", unit="drawing")))
