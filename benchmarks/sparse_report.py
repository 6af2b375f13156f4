"""``python -m benchmarks.sparse_report``: the sparse study's newest file -> README table, plot.

``benchmarks.sparse_study`` ends with it.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import bars, report, results
from benchmarks.results import Row

FOLDER = results.RESULTS / "sparse"
BEGIN, END = "<!-- sparse:begin -->", "<!-- sparse:end -->"
# both gradients have the same
BAR = bars.ACCURACY_LIMITS["rel_dh"]["bf16"]
_SHOWN = ("0.1", "0.01", "0.001")
_PLANS = ("recompute", "resident", "direction")
_COLORS = {
    "unseen text": "#1f5fa8",
    "seen text": "#0b7a43",
    "memorised text": "#c58b3b",
    "peaked random": "#d1495b",
}
_STYLES = (":", "--", "-")


def predicted_ratios(fraction: float) -> list[float]:
    """Return GPU time of the sparse forward + backward against our exact plans, as predicted.

    Units are products of N x H x V. The promise of 0.25 + 0.85 f against recompute's 4 units is
    1 + 3.4 f: each of the three products behind the forward costs 3.4 / 3 f. A frozen head has two.
    """
    trainable, frozen = 1 + 3.4 * fraction, 1 + 3.4 * 2 / 3 * fraction
    return [trainable / 4, trainable / 3, frozen / 2]


def break_even(units: int, products: int) -> float:
    """Return the f at which the prediction meets an exact plan of so many units."""
    return (units - 1) / (3.4 / 3 * products)


def publish(readme: Path = results.ROOT / "README.md", folder: Path = FOLDER) -> int:
    """Rewrite the README between the markers and draw the plot; 2 where the markers are missing."""
    documents = [results.load(path) for path in folder.glob("*.json")]
    document = max(documents, key=lambda document: document["made"])
    draw(document["rows"], folder / "sparse-study.png")
    return 0 if report.write_readme(readme, render(document), BEGIN, END) else 2


def render(document: dict) -> str:
    """Return the README's part."""
    rows = document["rows"]
    tiles = [row for row in rows if row["kind"] == "tiles" and row["order"] == "frequency"]
    ms = {row["workload"]: row["median_ms"] for row in rows if row["kind"] == "time"}
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in tiles):
        at = {row["at"]: row for row in tiles if row["workload"] == workload}
        cells = [workload, f"{at['bar']['nll']:.1f}"]
        for name in _SHOWN:
            found = at[name]
            errors = " / ".join(_error(found[kind]) for kind in ("rel_dh", "rel_dw"))
            cells.append(f"{found['fraction']:.2f}: {errors}")
        fractions = [at[name]["fraction"] for name in ("bar", "bar, means added")]
        cells.append(_ratios(fractions))
        cells += [_ratios(predicted_ratios(at[name]["fraction"])) for name in ("bar", "0.01")]
        times = ms[workload]
        cells.append(
            _ratios(
                times["sparse frozen" if plan == "direction" else "sparse trainable"] / times[plan]
                for plan in _PLANS
            )
        )
        lines.append(f"| {' | '.join(cells)} |")
    header = (
        "| rows | nats | tolerance 1e-1 | 1e-2 | 1e-3 | f at the bar | GPU time there, predicted | "
        "at 1e-2, predicted | CPU time at 1e-2, measured |"
    )
    rule = "|" + " --- |" * (header.count("|") - 1)
    table = "\n".join([header, rule, *lines])
    return "\n\n".join([f"**{report.headline(document)}**", table, _curve_line(rows)])


def _curve_line(rows: list[Row]) -> str:
    curves = {row["pass"]: row for row in rows if row["kind"] == "curve"}
    exact = curves.pop("0")
    last = sum(exact["losses"][-20:]) / 20
    parts = []
    for name, row in curves.items():
        most = max(abs(a - b) for a, b in zip(row["losses"], exact["losses"], strict=True))
        mean = sum(row["losses"][-20:]) / 20
        parts.append(
            f"tolerance {name}: {mean:.4f}, at most {most:.1e} apart at any step, mean f "
            f"{row['fraction']:.2f}"
        )
    return (
        f"DPO, {len(exact['losses'])} steps, V {exact['vocab']}, mean loss of the last 20 steps: "
        f"exact {last:.4f}; {'; '.join(parts)}."
    )


def draw(rows: list[Row], path: Path) -> None:
    """Draw grad_hidden's error over f, beside what pays, and the training curves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    tiles = [row for row in rows if row["kind"] == "tiles" and row["order"] == "frequency"]
    vocabs = sorted({row["vocab"] for row in tiles})
    styles = dict(zip(vocabs, _STYLES[-len(vocabs) :], strict=True))
    for workload in dict.fromkeys(row["workload"] for row in tiles):
        points = sorted(
            (row["fraction"], row["rel_dh"], row)
            for row in tiles
            if row["workload"] == workload and row["rel_dh"] > 0
        )
        if points:
            row = points[0][2]
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            style = {"color": _COLORS[row["source"]], "ls": styles[row["vocab"]]}
            left.plot(xs, ys, marker=".", **style)
    for color, name in ((color, name) for name, color in _COLORS.items()):
        left.plot([], [], color=color, label=name)
    for vocab, style in styles.items():
        left.plot([], [], color="black", ls=style, label=f"V {vocab:,}")
    left.axhline(BAR, color="black", lw=1)
    left.text(0.01, BAR * 0.8, "bf16 accuracy bar", fontsize=8, va="top")
    for name, f in zip(_PLANS, (break_even(4, 3), break_even(3, 3), break_even(2, 2)), strict=True):
        left.axvline(f, color="#9aa0a6", lw=1)
        left.text(f, 0.02, name + " ", fontsize=8, ha="right", transform=left.get_xaxis_transform())
    left.set(xlim=(0, 1.02), yscale="log", xlabel="f, fraction of tiles kept")
    left.set_title("error of grad_hidden; it pays left of a plan's line, as predicted", fontsize=10)
    left.legend(fontsize=8, loc="lower left")
    for row in rows:
        if row["kind"] == "curve":
            name = "exact" if row["pass"] == "0" else f"tolerance {row['pass']}"
            right.plot(row["losses"], lw=1, label=name)
    right.set(xlabel="step")
    right.set_title("DPO loss", fontsize=10)
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _ratios(values) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    sys.exit(publish())
