"""Options, responses and results of one ``preference_loss`` call, as backends take them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from spo_kernels.calls.loss_table import LossType, Parameters, loss_type_of

# rows of ``Scored.grads``: through the scores of both sides, through their plain log-probs, and
# through the third response
GRAD_ROWS = ("score_c", "score_r", "plain_c", "plain_r", "response")


class Side(NamedTuple):
    """One response of every pair; ``[P]`` holds sums, two axes hold token log-probs.

    Response p is row p of ``logps``, or the tokens ``offsets[p]:offsets[p + 1]`` of its rows.
    """

    logps: Any  # [P] or [B, T]
    ref: Any = None  # [P], or the shape of logps
    mask: Any = None  # the shape of logps: the tokens that count
    offsets: Any = None  # [P + 1] int64
    lengths: Any = None  # [P] int
    log_sum_sq: Any = None  # like ref

    @property
    def form(self) -> "Form":
        """The shape, dtype and layout that a backward needs."""
        return Form(self.logps.shape, self.logps.dtype, self.mask, self.offsets)


class Form(NamedTuple):
    """How the log-probs of one response were given."""

    shape: torch.Size
    dtype: torch.dtype
    mask: Any
    offsets: Any

    @property
    def has_tokens(self) -> bool:
        return len(self.shape) == 2

    @property
    def pairs(self) -> int:
        return self.shape[0] if self.offsets is None else self.offsets.numel() - 1


class PairData(NamedTuple):
    """Weights and rewards of the pairs, ``[P]`` each or None."""

    weights: torch.Tensor | None = None
    reward_chosen: torch.Tensor | None = None
    reward_rejected: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The checked options of a mix of losses, one object from the public op to the kernel."""

    losses: tuple[LossType, ...]
    weights: tuple[float, ...]
    parameters: Parameters
    divergence: str
    divergence_power: float  # a - 1 of the alpha divergence
    ld_alpha: float | None

    @property
    def needs_lengths(self) -> bool:
        return any("lengths" in loss.inputs for loss in self.losses)

    @property
    def is_batch(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the call."""
        return any(loss.batch for loss in self.losses)

    @property
    def couples_pairs(self) -> bool:
        """Whether it does so by more than the number of tokens, which is known beforehand."""
        return any(loss.couples_pairs for loss in self.losses)

    @property
    def of_margin(self) -> bool:
        """Whether the slopes of both sides are opposite: a function of the margin alone."""
        return self.divergence == "reverse_kl" and all(loss.of_margin for loss in self.losses)

    def packed(self) -> tuple[list[str], list[float]]:
        tails = "all tokens" if self.ld_alpha is None else "ld_alpha"
        numbers = [self.divergence_power, 1.0 if self.ld_alpha is None else self.ld_alpha]
        words = [self.divergence, tails, *(loss.name for loss in self.losses)]
        return words, [*numbers, *self.weights, *self.parameters]

    @classmethod
    def unpacked(cls, words: Sequence[str], numbers: Sequence[float]) -> "LossOptions":
        divergence, tails, *names = words
        power, ld_alpha, *others = numbers
        return cls(
            losses=tuple(loss_type_of(name) for name in names),
            weights=tuple(others[: len(names)]),
            parameters=Parameters(*others[len(names) :]),
            divergence=divergence,
            divergence_power=power,
            ld_alpha=ld_alpha if tails == "ld_alpha" else None,
        )


class Scored(NamedTuple):
    """Results of a forward; the last three have one row for each loss of the mix, or are None."""

    losses: torch.Tensor  # [P]
    rewards: torch.Tensor  # [2, P] of chosen, of rejected: beta * score
    sums: torch.Tensor  # [2, P] of chosen, of rejected: the policy's log-probs
    grads: torch.Tensor  # [5, P] dloss of the own pair, see GRAD_ROWS
    tails: torch.Tensor | None = None  # [2, P] int64: first token beyond the shared length
    ranks: torch.Tensor | None = (
        None  # [L, 2, P] int32: the rank, an index into losses, of each score
    )
    rank_grads: torch.Tensor | None = None  # [L, 2, P] dloss[rank] / dscore
    # [L, 2, P]: dloss / dstatistic, dstatistic / d(c - r)
    stats: torch.Tensor | None = None

    @property
    def kept(self) -> tuple[torch.Tensor | None, ...]:
        """The fields that a backward needs, from ``grads`` on."""
        return self[self._fields.index("grads") :]

    @classmethod
    def of_kept(cls, kept: Sequence[torch.Tensor | None]) -> "Scored":
        """Return the results as a backward sees them: without the outputs."""
        return cls(*(None,) * (len(cls._fields) - len(kept)), *kept)
