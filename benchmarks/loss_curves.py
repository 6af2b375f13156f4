"""``python -m benchmarks.loss_curves``: loss and slope of every pairwise type over the margin.

One picture a family in ``benchmarks/results/``, to lay beside the papers' own. The chosen score
runs from -m / 2 to m / 2 against the rejected one, sequences have 10 tokens, beta is 1, every other
parameter its default (label smoothing 0.1 where it must not be 0).
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from spo_kernels import preference_loss
from spo_kernels.loss_table import LOSS_TYPES, LossType

FOLDER = Path(__file__).parent / "results"
FAMILIES = {
    "margin": "sigmoid hinge exo_pair robust cpo discopop cell padll pfl",
    "two-sided": "nca_pair bco_pair sppo_hard apo_zero apo_down dual_clip",
    "normalised": "ipo sigmoid_norm simpo alphapo orpo",
    "adaptive": "ada_dpo ada_dpo_quadratic aql aqfl dbaql",
}


def curve(row: LossType, margins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and slope in the margin at each of ``margins``, one call a point."""
    losses, slopes = [], []
    for margin in margins:
        # around -20, log-probs of ten tokens that are all possible
        chosen = torch.full((1,), float(margin) / 2 - 20, dtype=torch.float64, requires_grad=True)
        rejected = torch.full((1,), -float(margin) / 2 - 20, dtype=torch.float64)
        rejected.requires_grad_()
        reference = torch.full((1,), -20.0, dtype=torch.float64)
        length = torch.full((1,), 10)
        out = preference_loss(
            chosen,
            rejected,
            reference,
            reference,
            loss_type=row.name,
            beta=1.0,
            label_smoothing=0.1 if "label_smoothing" in row.parameters else 0.0,
            chosen_lengths=length,
            rejected_lengths=length,
        )
        out.losses.sum().backward()
        losses.append(out.losses.item())
        # both sides move by half of the margin
        slopes.append((chosen.grad - rejected.grad).item() / 2)
    return torch.tensor(losses), torch.tensor(slopes)


def main() -> int:
    """Draw every family."""
    margins = torch.linspace(-4.0, 4.0, 161)
    for family, names in FAMILIES.items():
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for name in names.split():
            row = next(row for row in LOSS_TYPES if row.name == name)
            losses, slopes = curve(row, margins)
            left.plot(margins, losses, label=name)
            right.plot(margins, slopes, label=name)
        for axis, title in ((left, "loss"), (right, "d loss / d margin")):
            axis.set_title(title)
            axis.set_xlabel("margin c - r, beta 1")
            axis.grid(alpha=0.3)
        left.set_ylim(top=min(left.get_ylim()[1], 12.0))
        right.set_ylim(max(right.get_ylim()[0], -6.0), min(right.get_ylim()[1], 6.0))
        right.legend(fontsize=8)
        figure.savefig(FOLDER / f"losses-{family}.png", dpi=90)
        plt.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
