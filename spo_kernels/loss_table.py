"""The one table of loss types: name, id, parameters with their ranges, formula and paper.

Symbols of the formulas, all per pair: ``c`` and ``r`` are the scores of the chosen and the rejected
side, policy log-prob minus reference log-prob; ``len_c`` and ``len_r`` their completion lengths in
tokens, at least 1. A type joins as one row here, one function in each backend and one in the
reference; a parameter joins as one row of ``PARAMETERS`` and one keyword of the public op.
"""

import dataclasses
import math
from collections import namedtuple


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A Python number in the open interval (low, high)."""

    name: str
    low: float
    high: float
    meaning: str


@dataclasses.dataclass(frozen=True)
class LossType:
    """One pairwise loss; ``id`` is what a kernel is compiled for and never changes its meaning."""

    name: str
    id: int
    parameters: tuple[str, ...]
    needs_lengths: bool
    formula: str
    paper: str


PARAMETERS = (
    Parameter(name="beta", low=0.0, high=math.inf, meaning="inverse temperature of the margin"),
)

# one value of every parameter, what a backend is handed
Parameters = namedtuple("Parameters", [row.name for row in PARAMETERS])

LOSS_TYPES = (
    LossType(
        name="sigmoid",
        id=0,
        parameters=("beta",),
        needs_lengths=False,
        formula="log(1 + exp(-beta (c - r)))",
        paper="Rafailov et al. 2023, arXiv:2305.18290, Eq. 7",
    ),
    LossType(
        name="hinge",
        id=1,
        parameters=("beta",),
        needs_lengths=False,
        formula="max(0, 1 - beta (c - r))",
        paper="Zhao et al. 2023, arXiv:2305.10425, with the margin of arXiv:2309.06657",
    ),
    LossType(
        name="ipo",
        id=2,
        parameters=("beta",),
        needs_lengths=True,
        formula="(c / len_c - r / len_r - 1 / (2 beta))^2",
        paper="Azar et al. 2023, arXiv:2310.12036, Eq. 17, on per-token scores",
    ),
)

LOSS_TYPE_NAMES = tuple(row.name for row in LOSS_TYPES)


def loss_type_of(name: str) -> LossType:
    """Return the row called ``name``; the name has been checked."""
    return next(row for row in LOSS_TYPES if row.name == name)
