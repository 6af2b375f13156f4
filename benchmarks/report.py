"""``python -m benchmarks.report``: result files -> bars, README tables and plots.

The README gets ten headline numbers, ``benchmarks/README.md`` all of them.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from benchmarks import bars, headlines, results, tables

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
README = results.ROOT / "README.md"
PAGE = results.ROOT / "benchmarks" / "README.md"


def main(arguments: list[str] | None = None) -> int:
    """Print every bar as met or missed, rewrite both pages, draw the plots."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of results")
    parser.add_argument("--readme", type=Path, default=README, help="gets the headline numbers")
    parser.add_argument("--page", type=Path, default=PAGE, help="gets every table")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    documents = newest_documents(options.results)
    if not documents:
        print(f"report: no result files in {options.results.name}/. Run make bench or make gpu.")
        return 2
    for document in documents:
        print(tables.origin(document))
        for bar in bars.bars_for(document["rows"]):
            print("  " + bar_line(bar))
    if not options.no_plots and importlib.util.find_spec("matplotlib") is None:
        print("plots left out: matplotlib is not installed")
    elif not options.no_plots:
        from benchmarks import plots

        for path in plots.draw_all(documents, options.results):
            print(f"wrote {path.name}")
    texts = {
        options.readme: headlines.render(documents),
        options.page: tables.render(documents, pictures_of(options.results)),
    }
    bare = [path for path, text in texts.items() if not write_between(path, text)]
    for path in bare:
        print(f"report: {path} has no {BEGIN} ... {END}; left as it is", file=sys.stderr)
    return 2 if bare else 0


def newest_documents(folder: Path) -> list[dict]:
    """Return one document a machine, GPUs first: the newest row of each thing, with its commit."""
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
    return sorted(merged.values(), key=lambda document: "sm" not in document["machine"])


def bar_line(bar: bars.Bar) -> str:
    """Return one bar in words, its ratio first."""
    verdict = "met" if bar.met else "MISSED"
    number, limit = tables.ratio(bar.ratio), tables.ratio(bar.limit)
    line = f"{verdict:6} {number:>8} (bar {limit})  {bar.case}: {bar.what}"
    return line if bar.met else f"{line} ({bar.cause})"


def pictures_of(folder: Path) -> list[Path]:
    """Return the pictures of times and memory that lie in a folder."""
    return [
        path for kind in ("time-memory", "over-n") for path in sorted(folder.glob(f"{kind}-*.png"))
    ]


def write_between(path: Path, text: str, begin: str = BEGIN, end: str = END) -> bool:
    """Replace what stands between the markers; False where the file has none."""
    whole = path.read_text() if path.exists() else ""
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        return False
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    return True


if __name__ == "__main__":
    sys.exit(main())
