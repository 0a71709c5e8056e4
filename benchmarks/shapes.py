"""The parameters of real models, as lists of shapes: what the optimizers are measured on."""

from math import prod

Shapes = list[tuple[int, ...]]


def numel(shapes: Shapes) -> int:
    return sum(map(prod, shapes))


def vit(width: int, hidden: int, blocks: int, patch: int = 16) -> Shapes:
    """A ViT for images of 224 × 224 with a 1000-class head."""
    block: Shapes = [(width,)] * 2 + [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,)] * 2 + [(hidden, width), (hidden,), (width, hidden), (width,)]
    places = (224 // patch) ** 2 + 1
    stem: Shapes = [(1, 1, width), (1, places, width), (width, 3, patch, patch), (width,)]
    return stem + block * blocks + [(width,), (width,), (1000, width), (1000,)]


def resnet50() -> Shapes:
    norm = 2  # weight and bias
    shapes: Shapes = [(64, 3, 7, 7)] + [(64,)] * norm
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, *[shape[:1]] * norm]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), *[(4 * width,)] * norm]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def swin_t() -> Shapes:
    """Swin-T, windows of 7 × 7."""
    width, shapes = 96, [(96, 3, 4, 4), (96,), (96,), (96,)]
    for stage, (blocks, heads) in enumerate(((2, 3), (2, 6), (6, 12), (2, 24))):
        if stage:
            shapes += [(2 * width, 4 * width), (4 * width,), (4 * width,)]
            width *= 2
        block: Shapes = [(width,)] * 2 + [(169, heads), (3 * width, width), (3 * width,), (width, width), (width,)]
        block += [(width,)] * 2 + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
        shapes += block * blocks
    return [*shapes, (width,), (width,), (1000, width), (1000,)]


def lora_7b(rank: int = 8) -> Shapes:
    """LoRA on q, k, v and o of LLaMA-7B."""
    return [(rank, 4096), (4096, rank)] * (4 * 32)


def llama_1b() -> Shapes:
    """LLaMA 3.2 1B, embeddings tied."""
    width, hidden, kv = 2048, 8192, 512
    block: Shapes = [(width, width), (kv, width), (kv, width), (width, width)]
    block += [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(128256, width), *block * 16, (width,)]


MODELS: dict[str, Shapes] = {
    "ResNet-50": resnet50(),
    "Swin-T": swin_t(),
    "ViT-B/16": vit(768, 3072, 12),
    "ViT-L/16": vit(1024, 4096, 24),
    "ViT-H/14": vit(1280, 5120, 32, patch=14),
    "LLaMA-7B, LoRA r=8": lora_7b(),
    "LLaMA-1B": llama_1b(),
}
SMOKE: Shapes = [(64, 128), (128,), (40_000,)]  # reaches the vector path, the tail, and several chunks
ADAPTERS = ("LLaMA-7B, LoRA r=8",)  # anchored at zero


def part_of_vit(device: str) -> tuple[str, Shapes]:
    """On a CPU, tensors as large as ViT-B/16's, a quarter as many. Each stream of a step still is larger than the last
    cache, and setting up takes a quarter of the time. On a GPU, that of ViT-B/16 is short."""
    return ("ViT-B/16, 3 of 12 blocks", vit(768, 3072, 3)) if device == "cpu" else ("ViT-B/16", MODELS["ViT-B/16"])
