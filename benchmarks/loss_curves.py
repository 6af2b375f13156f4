"""``python -m benchmarks.loss_curves``: loss and slope of every loss type over one variable.

One picture a family in ``benchmarks/results/``, to lay beside the papers' own. beta is 1, every
other parameter its default (label smoothing 0.1 and a bend of 0.25 where the default hides a term).
Pairs: the chosen score runs from -m / 2 to m / 2 against the rejected one, ten tokens each.
Unpaired: the score of one response, good or bad, with kto's z at 1. Lists: the score of the best
of four, the others at 0.5, 0 and -0.5.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from spo_kernels import listwise_preference_loss, preference_loss, unpaired_preference_loss
from spo_kernels.calls.loss_table import (
    LISTWISE_LOSS_TYPES,
    UNPAIRED_LOSS_TYPES,
    LossType,
    loss_type_of,
)

FOLDER = Path(__file__).parent / "results"
FAMILIES = {
    "margin": "sigmoid hinge exo_pair robust cpo discopop cell padll pfl",
    "two-sided": "nca_pair bco_pair sppo_hard apo_zero apo_down dual_clip",
    "normalised": "ipo sigmoid_norm simpo alphapo orpo",
    "adaptive": "ada_dpo ada_dpo_quadratic aql aqfl dbaql",
}


Curve = tuple[torch.Tensor, torch.Tensor]


def curve(loss_of: Callable[[torch.Tensor], torch.Tensor], places: torch.Tensor) -> Curve:
    """Return loss and slope of a function of one number at each place, one call a point."""
    points = []
    for place in places:
        x = place.double().requires_grad_()
        loss = loss_of(x)
        (slope,) = torch.autograd.grad(loss, x)
        points.append((loss.item(), slope.item()))
    losses, slopes = torch.tensor(points).unbind(1)
    return losses, slopes


def pair_loss(row: LossType, margin: torch.Tensor) -> torch.Tensor:
    # around -20, log-probs of ten tokens that are all possible; both sides move by half the margin
    reference = torch.full((1,), -20.0, dtype=torch.float64)
    length = torch.full((1,), 10)
    out = preference_loss(
        (margin / 2 - 20)[None],
        (-margin / 2 - 20)[None],
        reference,
        reference,
        loss_type=row.name,
        beta=1.0,
        label_smoothing=0.1 if "label_smoothing" in row.parameters else 0.0,
        alphapo_alpha=0.25 if row.name == "alphapo" else 0.0,
        chosen_lengths=length,
        rejected_lengths=length,
    )
    return out.losses.sum()


def unpaired_loss(name: str, is_desirable: bool, score: torch.Tensor) -> torch.Tensor:
    # at 0, kto's curves would be apo_zero_unpaired's
    baselines = {"kto": {"kl": torch.ones((), dtype=torch.float64)}}
    baselines["bco"] = {"reward_shift": torch.zeros((), dtype=torch.float64)}
    out = unpaired_preference_loss(
        score[None],
        None,
        torch.tensor([is_desirable]),
        loss_type=name,
        beta=1.0,
        **baselines.get(name, {}),
    )
    return out.losses.sum()


def list_loss(name: str, score: torch.Tensor) -> torch.Tensor:
    others = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64)
    labels = torch.tensor([[0.9, 0.7, 0.4, 0.1]], dtype=torch.float64)
    logps = torch.cat([score[None], others])[None]
    return listwise_preference_loss(logps, labels, loss_type=name, beta=1.0).losses.sum()


def draw(name: str, xlabel: str, places: torch.Tensor, curves: dict[str, Curve]) -> None:
    """Write one picture: the losses on the left, their slopes on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for label, (losses, slopes) in curves.items():
        left.plot(places, losses, label=label)
        right.plot(places, slopes, label=label)
    for axis, title in ((left, "loss"), (right, "slope")):
        axis.set_title(title)
        axis.set_xlabel(xlabel)
        axis.grid(alpha=0.3)
    left.set_ylim(top=min(left.get_ylim()[1], 12.0))
    right.set_ylim(max(right.get_ylim()[0], -6.0), min(right.get_ylim()[1], 6.0))
    right.legend(fontsize=8)
    figure.savefig(FOLDER / f"losses-{name}.png", dpi=90)
    plt.close(figure)


def main() -> int:
    """Draw every family."""
    places = torch.linspace(-4.0, 4.0, 161)
    for family, names in FAMILIES.items():
        rows = [loss_type_of(name) for name in names.split()]
        curves = {row.name: curve(partial(pair_loss, row), places) for row in rows}
        draw(family, "margin c - r, beta 1", places, curves)
    curves = {
        f"{row.name}, {'good' if good else 'bad'}": curve(
            partial(unpaired_loss, row.name, good), places
        )
        for row in UNPAIRED_LOSS_TYPES
        for good in (True, False)
    }
    draw("unpaired", "score d, beta 1", places, curves)
    curves = {row.name: curve(partial(list_loss, row.name), places) for row in LISTWISE_LOSS_TYPES}
    draw("listwise", "score of the best of four, beta 1", places, curves)
    return 0


if __name__ == "__main__":
    sys.exit(main())
