r"""Why projecting helps, on a linear model: the expected loss out of distribution under a bound, and where it is least.

The setting is that of TPGM's analysis (Tian et al., CVPR 2023, Theorem 1); the bound below is derived here.

Weights θ in R^d. Fine-tuning from θ₀ on n < d examples y = Xθ_id + ξ, ξ ~ N(0, σ²I), by gradient descent to zero error
ends at θ₁ = θ₀ + X⁺(y − Xθ₀). The loss out of distribution, for inputs of covariance S, is L(θ) = ‖θ − θ_ood‖²_S.
With P = X⁺X, δ = θ_ood − θ₀, ε = ‖δ‖ (how far the pre-trained model is from its aim), ρ = ‖θ_id − θ_ood‖ (the shift)
and θ_α = θ₀ + α(θ₁ − θ₀), the triangle inequality and E ξξᵀ = σ²I give

    E L(θ_α) ≤ λ_max(S)·[(√((1 − α)²‖Pδ‖² + ‖(I − P)δ‖²) + αρ)² + α²σ² tr((XXᵀ)⁻¹)]

Its first term falls with α and its others grow: the nearer the pre-trained model, the smaller the best α.

    python -m examples.linear.run            # half a minute; the table and the picture go to results/
    python -m examples.linear.run --help
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib import colormaps
from torch import Tensor
from tqdm import tqdm

import robustft_kernels as rft
from examples.pictures import COLOURS, blank, name_ends, save

EPSILONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
ALPHAS = torch.linspace(0, 1, 41, dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """inputs X: (n, d). shifted: a factor F (d, d) of the covariance S = FFᵀ out of distribution. toward: δ, (d,).

    shift: θ_id − θ_ood, (d,). noise: σ. θ₀ is 0.
    """

    inputs: Tensor
    shifted: Tensor
    toward: Tensor
    shift: Tensor
    noise: float

    def finetuned(self, draws: int, g: torch.Generator) -> Tensor:
        """θ₁ for each draw of the noise, (draws, d)."""
        noise = self.noise * torch.randn(draws, len(self.inputs), generator=g, dtype=torch.float64)
        labels = self.inputs @ (self.toward + self.shift) + noise
        return labels @ torch.linalg.pinv(self.inputs).T

    def loss(self, theta: Tensor) -> Tensor:
        """L of each row of θ (..., d)."""
        return ((theta - self.toward) @ self.shifted).square().sum(-1)

    def bound(self, alpha: Tensor) -> Tensor:
        pinv = torch.linalg.pinv(self.inputs)
        kept = pinv @ (self.inputs @ self.toward)
        rest = (self.toward - kept).square().sum()
        bias = ((1 - alpha).square() * kept.square().sum() + rest).sqrt() + alpha * self.shift.norm()
        variance = alpha.square() * self.noise**2 * pinv.square().sum()
        return torch.linalg.matrix_norm(self.shifted, 2) ** 2 * (bias.square() + variance)


def draw(epsilon: float, g: torch.Generator, n: int = 40, d: int = 60, rho: float = 0.3, noise: float = 0.6) -> Problem:
    """Covariances of condition number 9 with random axes; δ and the shift in random directions."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def factor() -> Tensor:
        return torch.linalg.qr(normal(d, d))[0] * torch.linspace(0.5, 1.5, d, dtype=torch.float64)

    def of_length(length: float) -> Tensor:
        v = normal(d)
        return length * v / v.norm()

    return Problem(normal(n, d) @ factor().T, factor(), of_length(epsilon), of_length(rho), noise)


def learned_alpha(problem: Problem, theta: Tensor, g: torch.Generator, examples: int = 2000) -> float:
    """The α that TPGM ends with, on validation examples from out of distribution without noise."""
    param = torch.nn.Parameter(theta.clone())
    inputs = torch.randn(examples, len(theta), generator=g, dtype=torch.float64) @ problem.shifted.T
    labels = inputs @ problem.toward
    tpgm = rft.TPGM([("theta", param)], anchor="zero", lr=float(theta.norm()) / 50, init=float(theta.norm()) / 2)
    tpgm.update(lambda batch: (batch[0] @ param - batch[1]).square().mean(), [(inputs, labels)], 200, progress=False)
    tpgm.project_()
    return float(tpgm.alphas["theta"])


def measure(problems: int, draws: int) -> list[dict]:
    """For each problem: the mean loss and the bound at each α, the best α of both, and TPGM's for one draw."""
    rows = []
    for seed in tqdm(range(problems), desc="problems", unit="problem"):
        for epsilon in EPSILONS:
            g = torch.Generator().manual_seed(seed)
            problem = draw(epsilon, g)
            ends = problem.finetuned(draws, g)
            losses = torch.stack([problem.loss(alpha * ends).mean() for alpha in ALPHAS])
            bounds = problem.bound(ALPHAS)
            rows.append({
                "seed": seed, "ε": epsilon, "losses": losses, "bounds": bounds, "best": float(ALPHAS[losses.argmin()]),
                "best of bound": float(ALPHAS[bounds.argmin()]),
                "best of draw": float(ALPHAS[problem.loss(ALPHAS[:, None] * ends[0]).argmin()]),
                "learned": learned_alpha(problem, ends[0], g),
            })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| ε = ‖θ_ood − θ₀‖ | loss: at θ₀ | at the best α | at θ₁ | loss/bound: largest | best α | of the bound "
        "| TPGM's α | best α for its draw |",
        "|" + "---|" * 9,
    ]

    def spread(values: list[float]) -> str:
        return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}"

    for epsilon in EPSILONS:
        found = [row for row in rows if row["ε"] == epsilon]
        ends = [mean(float(row["losses"][k]) for row in found) for k in (0, -1)]
        least = mean(float(row["losses"].min()) for row in found)
        ratio = max(float((row["losses"] / row["bounds"]).max()) for row in found)
        alphas = [spread([row[key] for row in found]) for key in ("best", "best of bound", "learned", "best of draw")]
        lines.append(
            f"| {epsilon:g} | {ends[0]:.2f} | {least:.2f} | {ends[1]:.2f} | {ratio:.2f} | {' | '.join(alphas)} |"
        )
    return "\n".join(lines)


def picture(rows: list[dict], file: Path) -> None:
    figure, (left, right) = blank(1, 2, 4.2)
    for epsilon, colour in zip(EPSILONS, colormaps["cividis"](torch.linspace(0, 0.85, len(EPSILONS))), strict=True):
        found = [row for row in rows if row["ε"] == epsilon]
        losses, bounds = (torch.stack([row[key] for row in found]).mean(0) for key in ("losses", "bounds"))
        left.plot(ALPHAS, losses, color=colour, label=f"ε = {epsilon:g}")
        left.plot(ALPHAS, bounds, ":", color=colour)
    left.set(xlabel="α", ylabel="expected loss out of distribution; dotted: bound", yscale="log")
    for key, style, colour in (
        ("best", "o-", COLOURS["free"]),
        ("best of bound", "D:", COLOURS["in part"]),
        ("learned by TPGM", "X--", COLOURS["projection"]),
    ):
        heights = [mean(row[key.split(" by ")[0]] for row in rows if row["ε"] == epsilon) for epsilon in EPSILONS]
        right.plot(EPSILONS, heights, style, color=colour, label=key)
    right.set(xlabel="ε = ‖θ_ood − θ₀‖", ylabel="α", xscale="log", ylim=(-0.03, 1))
    right.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    right.minorticks_off()
    name_ends(figure)
    save(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--draws", type=int, default=400, help="of the noise, a problem")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the table and the picture go")
    args = parser.parse_args()
    rows = measure(args.problems, args.draws)
    text = table(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    picture(rows, args.out / "linear.png")
    (args.out / "linear.md").write_text(
        f"# A linear model: {args.problems} random problems, {args.draws} draws of the noise\n\n"
        f"Written by `python -m examples.linear.run --out {args.out}`. Its docstring states the setting and "
        "derives the bound.\n"
        "Losses are means over problems and draws. Each α is a mean ± standard deviation over problems.\n\n"
        f"{text}\n\n"
        "![losses and the best α](linear.png)\n"
    )
    print(f"\n{text}\n\npicture: {args.out / 'linear.png'}")


if __name__ == "__main__":
    main()
