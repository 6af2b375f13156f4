"""``python -m benchmarks.sparse.report``: the study's newest result file -> README table, plot.

``python -m benchmarks.sparse`` ends with it.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import bars, report, results, tables
from benchmarks.results import Row

README = Path(__file__).with_name("README.md")
FOLDER = README.with_name("results")
BEGIN, END = "<!-- sparse:begin -->", "<!-- sparse:end -->"
# both gradients have the same
BAR = bars.ACCURACY_LIMITS["rel_dh"]["bf16"]
_SHOWN = ("0.1", "0.01", "0.001")
# exact plans: their units (products of N x H x V), and those of a sparse backward with that head
_PLANS = {"recompute": (4, 3), "resident": (3, 3), "direction": (2, 2)}
# units of a sparse product at f = 1: the promise, 0.25 + 0.85 f of recompute, is 1 + 3.4 f units
_SPARSE_UNIT = 3.4 / 3
_COLORS = {
    "unseen text": "#1f5fa8",
    "seen text": "#0b7a43",
    "memorised text": "#c58b3b",
    "peaked random": "#d1495b",
}


def predicted_ratios(fraction: float) -> list[float]:
    """Return GPU time of the sparse forward + backward against every plan, as predicted."""
    return [(1 + products * _SPARSE_UNIT * fraction) / units for units, products in _PLANS.values()]


def break_even(plan: str) -> float:
    """Return the f at which the prediction meets an exact plan."""
    units, products = _PLANS[plan]
    return (units - 1) / (products * _SPARSE_UNIT)


def publish(readme: Path = README, folder: Path = FOLDER) -> int:
    """Rewrite the README between the markers and draw the plot; 2 where the markers are missing."""
    document = newest(folder)
    draw(document["rows"], folder / "sparse-study.png")
    return 0 if report.write_between(readme, render(document), BEGIN, END) else 2


def newest(folder: Path = FOLDER) -> dict:
    """Return the newest result file of the study."""
    documents = [results.load(path) for path in folder.glob("*.json")]
    return max(documents, key=lambda document: document["made"])


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
        cells += [_ratios(predicted_ratios(f)) for f in (min(fractions), at["0.01"]["fraction"])]
        times = ms[workload]
        cells.append(
            _ratios(
                times["sparse frozen" if plan == "direction" else "sparse trainable"] / times[plan]
                for plan in _PLANS
            )
        )
        lines.append(f"| {' | '.join(cells)} |")
    header = (
        "| rows | nats | tolerance 1e-1 | 1e-2 | 1e-3 | f at the bar | predicted there | "
        "predicted at 1e-2 | CPU at 1e-2 |"
    )
    rule = "|" + " --- |" * (header.count("|") - 1)
    table = "\n".join([header, rule, *lines])
    return "\n\n".join([f"**{tables.origin(document)}**", table, _curve_line(rows)])


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
    """Draw grad_hidden's error over f at the largest V, beside what pays, and the DPO losses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    vocab = max(row["vocab"] for row in rows)
    for source, color in _COLORS.items():
        chosen = sorted(
            (row for row in rows if row.get("order") == "frequency" and row["vocab"] == vocab),
            key=lambda row: row["fraction"],
        )
        found = [row for row in chosen if row["source"] == source and row["rel_dh"] > 0]
        fractions = [row["fraction"] for row in found]
        for name, style in (("rel_dh", "-"), ("rel_dh_means", "--")):
            label = source if name == "rel_dh" else None
            left.plot(
                fractions,
                [row[name] for row in found],
                style,
                color=color,
                marker=".",
                label=label,
            )
    left.plot([], [], "--", color="black", label="tiles' means added")
    left.axhline(BAR, color="black", lw=1, label="bf16 accuracy bar")
    for plan in _PLANS:
        f = break_even(plan)
        left.axvline(f, color="#9aa0a6", lw=1)
        left.text(
            f,
            0.99,
            f"faster than \n{plan} ",
            fontsize=8,
            ha="right",
            va="top",
            transform=left.get_xaxis_transform(),
        )
    left.set(
        xlim=(0.15, 1.02),
        ylim=(1e-4, 2),
        yscale="log",
        xlabel="f, fraction of tiles kept",
    )
    left.set_title(f"error of grad_hidden, V {vocab:,}; left of a line: faster, as predicted")
    for row in rows:
        if row["kind"] == "curve":
            name = "exact" if row["pass"] == "0" else f"tolerance {row['pass']}"
            right.plot(row["losses"], lw=1, label=name)
    right.set(yscale="log", xlabel="step")
    right.set_title(f"DPO loss, V {vocab:,}")
    for axis, place in ((left, "lower left"), (right, "upper right")):
        axis.legend(fontsize=8, loc=place)
        axis.title.set_fontsize(10)
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
