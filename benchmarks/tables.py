"""Result documents -> the Markdown tables of the measured numbers."""

from collections.abc import Iterable
from pathlib import Path

from benchmarks import bars, longest
from benchmarks.results import Row


def origin(document: dict) -> str:
    """Return one line that says where and from what a file's numbers come."""
    machine = document["machine"]
    parts = [machine["device"]]
    if machine.get("threads"):
        parts.append(f"{machine['threads']} threads")
    parts += [f"{name} {machine[name]}" for name in ("torch", "triton", "trl") if machine.get(name)]
    commits = sorted({row.get("commit", document["commit"]) for row in document["rows"]})
    return ", ".join(parts) + f", commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def render(documents: list[dict], pictures: Iterable[Path] = ()) -> str:
    """Return the page's part: the bars on a GPU, then per machine bars, times and accuracy."""
    parts = [_promise_table(documents)]
    for document in documents:
        rows = document["rows"]
        commands = ", ".join(f"`{command}`" for command in sorted({row["command"] for row in rows}))
        parts.append(f"## {document['machine']['device']}")
        parts.append(f"{origin(document)}. Made by {commands}.")
        parts.append(_bar_table(rows))
        for kind, title in (
            ("bar", "Forward + backward, round-robin, medians"),
            ("time", "Forward + backward, CUDA events, medians"),
            ("grid", "Forward + backward, other shapes, medians"),
        ):
            parts.append(_time_table(rows, kind, title))
        parts.append(_prediction_table(rows))
        parts.append(_extra_table(rows))
        parts.append(_accuracy_table(rows))
    parts.append(_longest_table(documents))
    parts.append("## Pictures")
    for path in pictures:
        what = path.stem.removeprefix("time-memory-").replace("over-n-", "over N, ")
        parts.append(f"![Time and memory: {what}](results/{path.name})")
    return "\n\n".join(part for part in parts if part)


def _bar_table(rows: list[Row]) -> str:
    lines = [
        f"| {bar.case} | {bar.what} | {ratio(bar.ratio)} | {ratio(bar.limit)} | "
        f"{'met' if bar.met else f'**missed**: {bar.cause}'} |"
        for bar in bars.bars_for(rows)
    ]
    return _titled("Every bar", table("| case | what | measured | bar | |", lines))


def _time_table(rows: list[Row], kind: str, title: str) -> str:
    chosen = [row for row in rows if row["kind"] == kind and row["pass"] == "forward_backward"]
    lines = []
    for row in chosen:
        if row["provider"] == "gemm" or row["kind"] == "sweep":
            continue
        head = "trainable" if row["trainable"] else "frozen"
        sizes = f"{row['rows']} x {row['hidden']} x {row['vocab']}"
        case = f"{row['shape']} {row['dtype']} {'peaked' if row['peaked'] else 'random'}"
        if row.get("error"):
            numbers = f"{row['error']} | | "
        else:
            units = row.get("gemm_units")
            strategy = f" ({row['strategy']}, {units} units)" if row["strategy"] else ""
            numbers = f"{ms(row['median_ms'])} | {mib(row.get('peak_bytes'))} | "
            numbers += f"{mib(row.get('planned_bytes'))}"
            row = {**row, "provider": row["provider"] + strategy}
        lines.append(f"| {case} | {sizes} | {head} | {row['provider']} | {numbers} |")
    header = "| workload | N x H x V | head | provider | time | peak memory | planned workspace |"
    return _titled(title, table(header, lines))


def _prediction_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row.get("planned_ms") is None or row.get("pass") != "forward_backward":
            continue
        times = row["planned_ms"] / row["median_ms"]
        # on a CPU the process holds more than the tensors that the plan is about
        found = row.get("tensor_bytes", row.get("workspace_bytes"))
        peak = f"{row['planned_bytes'] / found:.2f}" if found else ""
        lines.append(
            f"| {row['workload']} | {row['strategy']} | {ms(row['planned_ms'])} | "
            f"{ms(row['median_ms'])} | {times:.2f} | {mib(row['planned_bytes'])} | "
            f"{mib(found)} | {peak} | {row.get('load', '')} |"
        )
    header = (
        "| workload | strategy | planned | measured | ratio | planned | measured | ratio | load |"
    )
    return _titled("The planner's prediction beside what was measured", table(header, lines))


def worst_bars(documents: list[dict]) -> list[tuple[str, str, bars.Bar | None]]:
    """Return every promise about a GPU with its limit and its worst bar, None where unmeasured."""
    found: list[bars.Bar] = []
    for document in documents:
        gpu_bars = bars.gpu_bars(document["rows"])
        found += [*gpu_bars, *bars.accuracy_bars(document["rows"])] if gpu_bars else []
    worst = []
    for promise, limit, what in bars.GPU_PROMISES:
        mine = [bar for bar in found if bar.what.startswith(what)]
        worst.append((promise, limit, max(mine, key=lambda b: b.ratio - b.limit, default=None)))
    return worst


def _promise_table(documents: list[dict]) -> str:
    lines = []
    for promise, limit, bar in worst_bars(documents):
        cells = ["", "unmeasured"]
        if bar is not None:
            verdict = "met" if bar.met else "**missed**"
            cells = [f"{ratio(bar.ratio)} ({bar.case.removeprefix('GPU, ')})", verdict]
        lines.append(f"| {promise} | {limit} | {' | '.join(cells)} |")
    header = "| bar | limit | the worst case | |"
    return f"## Bars on a GPU\n\n{table(header, lines)}"


def _longest_table(documents: list[dict]) -> str:
    measured = {
        row["workload"]: row["measured_rows"]
        for document in documents
        for row in document["rows"]
        if row["kind"] == "longest" and row["measured_rows"]
    }
    lines = []
    for case in longest.cases():
        cells = []
        for memory_gb in longest.MEMORIES_GB:
            planned = longest.planned_rows(case, memory_gb * 10**9, "cuda:sm_90")
            found = measured.get(f"longest-{case.name}-{memory_gb}gb")
            cells.append(f"{planned:,} | {f'{found:,}' if found else 'unmeasured'}")
        head = "trainable" if case.trainable else "frozen"
        lines.append(f"| {case.shape} | {head} | {' | '.join(cells)} |")
    header = "| model shape | head | 80 GB, planned | measured | 24 GB, planned | measured |"
    what = (
        "Counted are hidden states, head, labels, workspace and returned gradients; the rest of a "
        "model is not there."
    )
    return f"## Most rows of one call, bf16, sm_90\n\n{what}\n\n{table(header, lines)}"


def _extra_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["kind"] in ("step", "degree", "pairs", "linear_pairs"):
            lines.append(
                f"| {row['workload']} | {row['provider']} | {ms(row['median_ms'])} | "
                f"{mib(row.get('peak_bytes'))} | {row.get('note', '')} |"
            )
        if row["kind"] == "launches":
            lines.append(
                f"| {row['workload']} | {row['provider']} | {row['kernels_forward']} + "
                f"{row['kernels_backward']} kernels | | {row['host_syncs']} host syncs"
                + (f", longest {row['launch_us']:.1f} us |" if "launch_us" in row else " |")
            )
    title = "Training step, degree loss, losses of pairs, launches"
    return _titled(title, table("| what | provider | | | |", lines))


def _accuracy_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["kind"] != "accuracy":
            continue
        head = "trainable" if row["trainable"] else "frozen"
        case = f"{row['dtype']} {'peaked' if row['peaked'] else 'random'} {head}"
        sizes = f"{row['rows']} x {row['hidden']} x {row['vocab']}"
        errors = " | ".join(_error(row[name]) for name in ("max_dlogp", "rel_dh", "rel_dw"))
        lines.append(f"| {case} | {sizes} | {row['provider']} | {errors} |")
    header = "| inputs | N x H x V | provider | max log-prob error | grad_hidden | grad_weight |"
    title = "Distance from fp64 on the same rounded inputs, worst of the seeds"
    return _titled(title, table(header, lines))


def _titled(title: str, lines: str) -> str:
    return f"### {title}\n\n{lines}" if lines else ""


def table(header: str, lines: list[str]) -> str:
    """Return a table of ready lines, "" without any."""
    if not lines:
        return ""
    rule = "|" + " --- |" * (header.count("|") - 1)
    return "\n".join([header, rule, *lines])


def ratio(value: float) -> str:
    """Return a ratio, or an error where it is that small."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if value < 1e-2 else f"{value:.3f}x"


def ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f} MiB"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
