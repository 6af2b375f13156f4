"""Pictures of the results: time and memory on log axes, and which strategy the planner takes."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.results import Row
from benchmarks.workloads import MODEL_SHAPES
from spo_kernels import plan_linear_logprob

_COLORS = {
    "eager": "#9aa0a6",
    "torch.compile": "#5f6368",
    "torch.lce": "#c58b3b",
    "trl": "#d1495b",
    "liger": "#8d6cab",
    "cce": "#4a8fa8",
    "spo": "#0b7a43",
}
_STRATEGY_COLORS = {"direction": "#0b7a43", "resident": "#7fc29b", "recompute": "#1f5fa8"}
_NOTHING_FITS = "#f1d4d4"
_MIB = 1 << 20
_BARS_N = 8192
_FLOORS = "floor: spo's products alone; gradients returned"


def draw_all(documents: Sequence[dict], folder: Path) -> list[Path]:
    """Draw every picture there is data for and return the files."""
    paths = []
    for document in documents:
        is_gpu = any(row["kind"] == "time" for row in document["rows"])
        kind, label = ("time", "gpu") if is_gpu else ("bar", "cpu")
        rows = [
            row
            for row in document["rows"]
            if row["kind"] == kind
            and row["pass"] == "forward_backward"
            and row["provider"] in _COLORS
            and not row.get("error")
        ]
        if rows:
            # one N of a GPU's many: the pictures over N show the others
            at_one_n = [row for row in rows if row["rows"] == _BARS_N]
            rows = at_one_n if is_gpu and at_one_n else rows
            floors = [row for row in document["rows"] if row.get("provider") == "gemm"]
            paths.append(_draw_times(rows, floors, document, folder / f"time-memory-{label}.png"))
        sweep = [row for row in document["rows"] if row["kind"] in ("sweep", "time")]
        sweep = [row for row in sweep if row["pass"] == "forward_backward"]
        for shape in sorted({row["shape"] for row in sweep}):
            chosen = [row for row in sweep if row["shape"] == shape]
            if len({row["rows"] for row in chosen}) > 1:
                name = f"over-n-{label}-{shape.replace('/', '-')}.png"
                paths.append(draw_over_n(chosen, document, folder / name))
    paths.append(draw_strategies(folder / "strategies.png"))
    return paths


def _draw_times(rows: list[Row], floors: list[Row], document: dict, path: Path) -> Path:
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    names = [name for name in _COLORS if any(row["provider"] == name for row in rows)]
    figure, axes = plt.subplots(
        1, 2, figsize=(12, 1.6 + 0.28 * len(rows)), sharey=True, layout="constrained"
    )
    height = 0.8 / len(names)
    for axis, (field, scale, label) in zip(
        axes,
        (("median_ms", 1.0, "time of forward + backward, ms"), ("peak_bytes", _MIB, "peak, MiB")),
        strict=True,
    ):
        for index, name in enumerate(names):
            found = [
                (workloads.index(row["workload"]), row[field] / scale)
                for row in rows
                if row["provider"] == name and row.get(field)
            ]
            if not found:
                continue
            places = [place + (index - (len(names) - 1) / 2) * height for place, _ in found]
            values = [value for _, value in found]
            bars = axis.barh(places, values, height=0.9 * height, color=_COLORS[name], label=name)
            for text in axis.bar_label(bars, fmt=_short, padding=3, fontsize=8):
                # a floor's dots may run behind a number
                text.set_bbox({"color": "white", "pad": 0.5})
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel(label)
        axis.margins(x=0.12)
        axis.grid(axis="x", which="both", alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    _draw_floor(axes, workloads, rows, floors)
    axes[0].set_yticks(range(len(workloads)), [_case_of(rows, name) for name in workloads])
    axes[0].set_ylim(len(workloads) - 0.4, -0.6)
    axes[0].plot([], [], color="black", lw=1.5, ls=":", label=_FLOORS)
    _legend_below(figure, axes[0])
    figure.suptitle(f"linear_logprob, {document['machine']['device']}, commit {document['commit']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_over_n(rows: list[Row], document: dict, path: Path) -> Path:
    """Draw time and peak memory over N, log-log, one row of axes a head, with the floor."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for line, trainable in zip(axes, (False, True), strict=True):
        head = [r for r in rows if r["trainable"] == trainable]
        for axis, field, scale in zip(line, ("median_ms", "peak_bytes"), (1, _MIB), strict=True):
            for name, color in _COLORS.items():
                found = sorted(
                    (r["rows"], r[field] / scale)
                    for r in head
                    if r["provider"] == name and r.get(field)
                )
                if found:
                    axis.plot(*zip(*found, strict=True), marker="o", color=color, label=name)
            axis.set(xscale="log", yscale="log")
            _plain_numbers(axis.yaxis)
            axis.grid(which="both", alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
        unit_ms = {r["rows"]: r["median_ms"] for r in head if r["provider"] == "gemm"}
        ours = {r["rows"]: r for r in head if r["provider"] == "spo"}
        counts = sorted(ours)
        bare = [(n, ours[n]["gemm_units"] * unit_ms[n]) for n in counts if n in unit_ms]
        returned = [
            (n, (ours[n]["peak_bytes"] - ours[n]["workspace_bytes"]) / _MIB)
            for n in counts
            if ours[n].get("peak_bytes")
        ]
        for axis, points in zip(line, (bare, returned), strict=True):
            if points:
                axis.plot(*zip(*points, strict=True), color="black", ls=":", label=_FLOORS)
            axis.set_xticks(counts, [f"{n:,}" for n in counts])
            axis.set_xticks([], minor=True)
        kind = "trainable" if trainable else "frozen"
        line[0].set_ylabel(f"{kind} head: forward + backward, ms")
        line[1].set_ylabel("peak memory beyond the inputs, MiB")
    for axis in axes[1]:
        axis.set_xlabel("N, scored rows")
    _legend_below(figure, axes[0, 0])
    sizes = f"H {rows[0]['hidden']}, V {rows[0]['vocab']}, {rows[0]['dtype']}"
    where = f"{document['machine']['device']}, commit {document['commit']}"
    figure.suptitle(f"linear_logprob, {sizes}, {where}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _case_of(rows: list[Row], workload: str) -> str:
    """Return a workload's sizes and inputs in three lines."""
    row = next(row for row in rows if row["workload"] == workload)
    head = "trainable" if row["trainable"] else "frozen"
    sizes = f"H {row['hidden']}, V {row['vocab']:,}\nN {row['rows']:,}, {row['dtype']}"
    return f"{sizes}, {'peaked' if row['peaked'] else 'random'}\n{head} head"


def _plain_numbers(axis) -> None:
    """Label a log axis with 1, 2, 5, 10, ... instead of powers."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, place: f"{value:,g}")
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _legend_below(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=len(labels), loc="outside lower center")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _draw_floor(axes, workloads: list[str], rows: list[Row], floors: list[Row]) -> None:
    """Dot the least possible: our units as bare GEMMs, and the gradients everybody returns."""
    unit_ms = {row["workload"]: row["median_ms"] for row in floors}
    for row in rows:
        if row["provider"] != "spo":
            continue
        place = workloads.index(row["workload"])
        floor_bytes = row.get("peak_bytes", 0) - row.get("workspace_bytes", 0)
        marks = [(axes[1], floor_bytes / _MIB)]
        if row["workload"] in unit_ms:
            marks.append((axes[0], row["gemm_units"] * unit_ms[row["workload"]]))
        for axis, value in marks:
            if value > 0:
                axis.plot([value] * 2, [place - 0.42, place + 0.42], color="black", lw=1.5, ls=":")


def draw_strategies(path: Path) -> Path:
    """Draw which strategy the planner takes over N and budget, head trainable, on an sm_90."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
    rows = np.geomspace(256, 131072, 41)
    budgets = np.geomspace(64 * _MIB, 64 * 1024 * _MIB, 41)
    order = list(_STRATEGY_COLORS)
    colors = matplotlib.colors.ListedColormap([*_STRATEGY_COLORS.values(), _NOTHING_FITS])
    for axis, shape in zip(axes, ("qwen05", "llama1b", "trl7244"), strict=True):
        hidden, vocab = MODEL_SHAPES[shape]
        picture = np.empty((len(budgets), len(rows)))
        defaults = []
        for column, count in enumerate(rows):
            default = _plan(int(count), hidden, vocab, None)
            defaults.append(default.budget_bytes / _MIB)
            for line, budget in enumerate(budgets):
                try:
                    strategy = _plan(int(count), hidden, vocab, int(budget)).strategy
                    picture[line, column] = order.index(strategy)
                except ValueError:
                    picture[line, column] = len(order)
        axis.pcolormesh(
            rows, budgets / _MIB, picture, cmap=colors, vmin=-0.5, vmax=len(order) + 0.5
        )
        axis.plot(rows, defaults, color="black", lw=2, label="default budget")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("N, scored rows")
        axis.set_title(f"{shape}: H {hidden}, V {vocab}")
    axes[0].set_ylabel("budget, MiB")
    patches = [
        matplotlib.patches.Patch(color=color, label=name)
        for name, color in _STRATEGY_COLORS.items()
        if name != "direction"
    ]
    patches.append(matplotlib.patches.Patch(color=_NOTHING_FITS, label="nothing fits: raises"))
    line = matplotlib.lines.Line2D([], [], color="black", lw=2, label="default budget")
    axes[0].legend(handles=[*patches, line], fontsize=8, loc="upper left")
    figure.suptitle(
        "Which strategy will I get? bf16, trainable head, sm_90 "
        "(frozen head: direction; no gradient: score)"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _plan(rows: int, hidden: int, vocab: int, budget: int | None):
    return plan_linear_logprob(
        rows=rows,
        hidden_size=hidden,
        vocab_size=vocab,
        dtype=torch.bfloat16,
        gathered=False,
        budget_bytes=budget,
        device="cuda:sm_90",
    )
