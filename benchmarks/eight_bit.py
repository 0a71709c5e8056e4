"""How far AdamW with low moments goes from AdamW, on one stream of gradients.

python -m benchmarks.eight_bit        prints a table. torchao and bitsandbytes are compared if they are installed.

The sizes of gradients differ over elements by a log-normal factor. A third of each is the same at every step. After two
thirds of the steps all become a third, so that second moments must fall.
"""

from collections.abc import Callable
from statistics import mean

import torch
from torch import Tensor, nn

import robustft_kernels as rft

from .contenders import PEERS, PLAIN
from .markdown import table

SHAPES = ((512, 512), (1024, 256), (256,))
STEPS, SEEDS = 300, 3
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def ours(state_dtype: torch.dtype | str) -> Make:
    return lambda params: rft.AnchoredAdamW(params, method="none", state_dtype=state_dtype, **PLAIN)


CONTENDERS: dict[str, Make] = {
    "ours, float32": ours(torch.float32),
    "ours, bf16 moments": ours(torch.bfloat16),
    "ours, 8 bits": ours("8bit"),
    **{name: PEERS[name].make for name in ("torchao, 8-bit", "bitsandbytes, 8-bit")},
}


def path(make: Make, seed: int) -> Tensor:
    """From the first weights to the last, flat."""
    generator = torch.Generator().manual_seed(seed)
    start, sizes, drifts = ([torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(3))
    params = [nn.Parameter(0.02 * of) for of in start]
    optimizer = make(params)
    for t in range(STEPS):
        for param, size, drift in zip(params, sizes, drifts, strict=True):
            noise = torch.randn(param.shape, generator=generator)
            param.grad = 1e-3 * size.exp() * (noise + 0.3 * drift) / (3 if t >= 2 * STEPS // 3 else 1)
        optimizer.step()
    return torch.cat([(param.detach() - 0.02 * of).flatten() for param, of in zip(params, start, strict=True)])


def main() -> None:
    exact = [path(lambda params: torch.optim.AdamW(params, **PLAIN), seed) for seed in range(SEEDS)]
    rows = []
    for name, make in CONTENDERS.items():
        if why := PEERS[name].missing(torch.device("cpu")) if name in PEERS else "":
            rows.append([name, why, ""])
            continue
        paths = [path(make, seed) for seed in range(SEEDS)]
        apart = [float((a - b).norm() / b.norm()) for a, b in zip(paths, exact, strict=True)]
        longer = mean(float(a.norm() / b.norm()) for a, b in zip(paths, exact, strict=True))
        rows.append([name, f"{min(apart):.3f}–{max(apart):.3f}", f"{longer:.3f}"])
    print(table(["moments", "distance of the ends / length of the path", "length / AdamW's"], rows))


if __name__ == "__main__":
    main()
