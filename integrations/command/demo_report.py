"""The end of the demo: the curves as a PNG, the measured peak memory, the table."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.table import Table

from spo_kernels import Plan, linear_logprob, plan_linear_logprob

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

TRAIN, HELD_OUT, MUTED = "#1f5fa8", "#d1622b", "#8a8f98"
LOG_2 = 0.6931471805599453

Curve = tuple[list[float], list[float]]


def curve(history: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Return steps and values of one metric of a trainer's log history."""
    entries = [entry for entry in history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes torch's CPU allocator held during ``work``, above its start."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def compare_memory(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[int, int, Plan]:
    """Return peak bytes of ``linear_logprob`` and of eager logits, and the plan of the former.

    Forward and backward on ``hidden [N, H]``, ``weight [V, H]``, ``labels [N]``, none ignored.
    """
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_()

    def eager() -> None:
        logps = torch.log_softmax(hidden @ weight.T, dim=-1)
        torch.autograd.grad(logps.gather(-1, labels[:, None]).sum(), (hidden, weight))

    def fused() -> None:
        torch.autograd.grad(linear_logprob(hidden, weight, labels).logps.sum(), (hidden, weight))

    plan = plan_linear_logprob(
        rows=labels.numel(),
        hidden_size=weight.shape[1],
        vocab_size=weight.shape[0],
        dtype=hidden.dtype,
        device="cpu",
    )
    return peak_bytes(fused), peak_bytes(eager), plan


def draw_curves(warm_up: Curve, history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Save the four curves worth looking at: warm-up, alignment, rewards, degrees."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    figure.suptitle("SPO on 40 preference pairs, a model built from scratch", fontsize=13)

    axis = axes[0][0]
    axis.plot(*warm_up, color=TRAIN)
    axis.set(title="Language-model warm-up", xlabel="step", ylabel="nats per token")

    def both(axis: Any, key: str) -> None:
        axis.plot(*curve(history, key), color=TRAIN, label="training pairs")
        axis.plot(
            *curve(history, f"eval_{key}"), color=HELD_OUT, marker="o", ms=4, label="held-out pairs"
        )

    axis = axes[0][1]
    both(axis, "spo/alignment_loss")
    axis.axhline(LOG_2, color=MUTED, ls="--", lw=1, label="no preference (log 2)")
    axis.set(title="Alignment loss", xlabel="step", ylim=(0, None))
    axis.legend(frameon=False)

    axis = axes[1][0]
    both(axis, "rewards/accuracies")
    axis.axhline(0.5, color=MUTED, ls="--", lw=1, label="guessing")
    axis.set(
        title="Reward accuracy (chosen above rejected)",
        xlabel="step",
        ylabel="share",
        ylim=(0, 1.05),
    )
    axis.legend(frameon=False, loc="lower right")

    axis = axes[1][1]
    both(axis, "spo/degree_accuracy")
    steps, chance = curve(history, "eval_spo/degree_chance")
    axis.plot(steps, chance, color=MUTED, ls="--", lw=1, label="always the commonest degree")
    axis.set(title="Degree accuracy", xlabel="step", ylabel="share", ylim=(0, 1.05))
    axis.legend(frameon=False, loc="center right")

    figure.savefig(path, dpi=130)
    plt.close(figure)


def summary_table(rows: Sequence[tuple[str, str, str]]) -> Table:
    """Return a table of (quantity, value, its comparison)."""
    table = Table(title="spo-kernels demo", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("beside")
    for row in rows:
        table.add_row(*row)
    return table
