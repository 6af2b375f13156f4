"""``python -m benchmarks.report``: result files -> the bars, the README's tables and the plots."""

import argparse
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import bars as bars_of
from benchmarks import longest, results
from benchmarks.results import Row

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
_README = results.ROOT / "README.md"


def main(arguments: list[str] | None = None) -> int:
    """Print every bar as met or missed, rewrite the README between its markers, draw the plots."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of results")
    parser.add_argument("--readme", type=Path, default=_README)
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    documents = newest_documents(options.results)
    if not documents:
        print(f"report: no result files in {options.results.name}/. Run make bench or make gpu.")
        return 2
    for document in documents:
        print(headline(document))
        for bar in bars_for(document["rows"]):
            print("  " + bar_line(bar))
    if not options.no_plots and importlib.util.find_spec("matplotlib") is None:
        print("plots left out: matplotlib is not installed")
    elif not options.no_plots:
        from benchmarks import plots

        for path in plots.draw_all(documents, options.results):
            print(f"wrote {path.name}")
    text = render(documents, pictures_of(options.results))
    if not write_readme(options.readme, text):
        print(
            f"report: {options.readme.name} has no {BEGIN} ... {END}; left as it is",
            file=sys.stderr,
        )
        return 2
    return 0


def newest_documents(folder: Path) -> list[dict]:
    """Return one document a machine: of each thing measured the newest row, with its commit."""
    documents = sorted(
        (results.load(path) for path in sorted(folder.glob("*.json"))),
        key=lambda document: document.get("made", ""),
    )
    merged: dict[str, dict] = {}
    for document in documents:
        machine = f"{document['machine'].get('device')} {document['machine'].get('threads')}"
        rows = {results.row_key(row): row for row in merged.get(machine, {}).get("rows", ())}
        for row in document["rows"]:
            rows[results.row_key(row)] = {"commit": document["commit"], **row}
        merged[machine] = {**document, "rows": list(rows.values())}
    return list(merged.values())


def headline(document: dict) -> str:
    """Return one line that says where and from what a file's numbers come."""
    machine = document["machine"]
    parts = [machine["device"]]
    if machine.get("threads"):
        parts.append(f"{machine['threads']} threads")
    parts += [f"{name} {machine[name]}" for name in ("torch", "triton", "trl") if machine.get(name)]
    commits = sorted({row.get("commit", document["commit"]) for row in document["rows"]})
    return ", ".join(parts) + f", commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def bars_for(rows: Iterable[Row]) -> list[bars_of.Bar]:
    """Return every bar the rows can answer."""
    rows = list(rows)
    return [*bars_of.cpu_bars(rows), *bars_of.gpu_bars(rows), *bars_of.accuracy_bars(rows)]


def bar_line(bar: bars_of.Bar) -> str:
    """Return one bar in words, its ratio first."""
    verdict = "met" if bar.met else "MISSED"
    number = _ratio(bar.ratio)
    line = f"{verdict:6} {number:>8} (bar {_ratio(bar.limit)})  {bar.case}: {bar.what}"
    return line if bar.met else f"{line} ({bar.cause})"


def pictures_of(folder: Path) -> list[Path]:
    """Return the pictures of times and memory that lie in a folder."""
    return [
        path for kind in ("time-memory", "over-n") for path in sorted(folder.glob(f"{kind}-*.png"))
    ]


def render(documents: list[dict], pictures: Iterable[Path] = ()) -> str:
    """Return the README's part: per machine the bars, times and accuracy, then the pictures."""
    parts = []
    for document in documents:
        rows = document["rows"]
        parts.append(f"**{headline(document)}**")
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
        commands = sorted({row["command"] for row in rows})
        parts.append("Made by " + ", ".join(f"`{command}`" for command in commands) + ".")
    parts.append(_promise_table(documents))
    parts.append(_longest_table(documents))
    for path in pictures:
        what = path.stem.removeprefix("time-memory-").replace("over-n-", "over N, ")
        parts.append(f"![Time and memory: {what}](benchmarks/results/{path.name})")
    return "\n\n".join(part for part in parts if part)


def write_readme(path: Path, text: str, begin: str = BEGIN, end: str = END) -> bool:
    """Replace what stands between the markers; False where the file has none."""
    whole = path.read_text() if path.exists() else ""
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        return False
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    return True


def _bar_table(rows: list[Row]) -> str:
    lines = [
        f"| {bar.case} | {bar.what} | {_ratio(bar.ratio)} | {_ratio(bar.limit)} | "
        f"{'met' if bar.met else f'**missed**: {bar.cause}'} |"
        for bar in bars_for(rows)
    ]
    return _table("| case | what | measured | bar | |", lines)


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
            numbers = f"{_ms(row['median_ms'])} | {_mib(row.get('peak_bytes'))} | "
            numbers += f"{_mib(row.get('planned_bytes'))}"
            row = {**row, "provider": row["provider"] + strategy}
        lines.append(f"| {case} | {sizes} | {head} | {row['provider']} | {numbers} |")
    header = "| workload | N x H x V | head | provider | time | peak memory | planned workspace |"
    return _titled(title, _table(header, lines))


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
            f"| {row['workload']} | {row['strategy']} | {_ms(row['planned_ms'])} | "
            f"{_ms(row['median_ms'])} | {times:.2f} | {_mib(row['planned_bytes'])} | "
            f"{_mib(found)} | {peak} | {row.get('load', '')} |"
        )
    header = (
        "| workload | strategy | planned | measured | ratio | planned | measured | ratio | load |"
    )
    return _titled("The planner's prediction beside what was measured", _table(header, lines))


def _promise_table(documents: list[dict]) -> str:
    """Return a line for every promise about a GPU: the worst ratio, unmeasured, or left out."""
    found = []
    for document in documents:
        bars = bars_of.gpu_bars(document["rows"])
        found += [*bars, *bars_of.accuracy_bars(document["rows"])] if bars else []
    lines = []
    for promise, limit, what in bars_of.GPU_PROMISES:
        mine = [bar for bar in found if what and bar.what.startswith(what)]
        worst = max(mine, key=lambda bar: bar.ratio - bar.limit, default=None)
        measured = "unmeasured" if what else "left out"
        if worst is not None:
            measured = f"{_ratio(worst.ratio)} ({worst.case})"
        lines.append(f"| {promise} | {limit} | {measured} |")
    return _titled("Bars on a GPU, the worst case of each", _table("| bar | limit | |", lines))


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
    title = (
        "Most rows of one call, bf16, sm_90: hidden states, head, labels, workspace and returned "
        "gradients, nothing else of a model"
    )
    return _titled(title, _table(header, lines))


def _extra_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["kind"] in ("step", "degree", "pairs", "linear_pairs"):
            lines.append(
                f"| {row['workload']} | {row['provider']} | {_ms(row['median_ms'])} | "
                f"{_mib(row.get('peak_bytes'))} | {row.get('note', '')} |"
            )
        if row["kind"] == "launches":
            lines.append(
                f"| {row['workload']} | {row['provider']} | {row['kernels_forward']} + "
                f"{row['kernels_backward']} kernels | | {row['host_syncs']} host syncs"
                + (f", longest {row['launch_us']:.1f} us |" if "launch_us" in row else " |")
            )
    title = "Training step, degree loss, losses of pairs, launches"
    return _titled(title, _table("| what | provider | | | |", lines))


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
    return _titled(title, _table(header, lines))


def _titled(title: str, table: str) -> str:
    return f"{title}\n\n{table}" if table else ""


def _table(header: str, lines: list[str]) -> str:
    if not lines:
        return ""
    rule = "|" + " --- |" * (header.count("|") - 1)
    return "\n".join([header, rule, *lines])


def _ratio(value: float) -> str:
    return f"{value:.1e}" if value < 1e-2 else f"{value:.3f}x"


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f} MiB"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main())
