"""A plan: the strategy and chunks of one call over a linear head, and the table behind it."""

import dataclasses
from typing import Literal

Strategy = Literal["score", "direction", "resident", "recompute", "pairwise"]
# linear_logprob's own; ``pairwise`` is for linear_preference_loss alone
STRATEGIES: tuple[Strategy, ...] = ("score", "direction", "resident", "recompute")
PAIR_STRATEGIES: tuple[Strategy, ...] = ("pairwise", *STRATEGIES)
OUTPUTS = ("logps", "entropy", "logsumexp", "mean_logits", "is_top1", "log_sum_sq_probs")
GRAD_INPUTS = ("hidden", "weight", "bias", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One (strategy, row chunk, vocab chunk) with its predicted cost."""

    strategy: Strategy
    row_chunk: int
    vocab_chunk: int
    gemm_units: int
    bytes_moved: int
    peak_bytes: int
    time_ms: float
    # pairwise: rows whose exponentials live at one time
    group_rows: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Candidate):
    """The chosen candidate, the call it was chosen for, and every candidate there was."""

    budget_bytes: int
    rows: int
    hidden_size: int
    vocab_size: int
    device: str
    candidates: tuple[Candidate, ...]
    op: str = "linear_logprob"

    def explain(self) -> str:
        """Return the table the plan was chosen from, the chosen row marked with ``*``."""
        head = (
            f"{self.op}: {self.rows} rows x hidden {self.hidden_size} x vocab "
            f"{self.vocab_size} on {self.device}, budget {_human(self.budget_bytes)}"
        )
        titles = ("", "strategy", "units", "row_chunk", "vocab_chunk", "workspace", "moved", "time")
        lines = [titles]
        mine = (self.strategy, self.row_chunk, self.vocab_chunk, self.group_rows)
        for c in self.candidates:
            chosen = (c.strategy, c.row_chunk, c.vocab_chunk, c.group_rows) == mine
            mark = "*" if chosen else "" if c.peak_bytes <= self.budget_bytes else "over"
            lines.append(
                (
                    mark,
                    c.strategy + (f" of {c.group_rows} rows" if c.group_rows else ""),
                    str(c.gemm_units),
                    str(c.row_chunk),
                    str(c.vocab_chunk),
                    _human(c.peak_bytes),
                    _human(c.bytes_moved),
                    f"{c.time_ms:.2f} ms",
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
        table = [
            "  ".join(cell.rjust(w) for cell, w in zip(ln, widths, strict=True)) for ln in lines
        ]
        return "\n".join([head, *table])


def _human(size: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
