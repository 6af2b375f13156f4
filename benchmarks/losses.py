"""``python -m benchmarks.losses``: the loss table -> the tables of spo_kernels/LOSSES.md."""

import inspect
import sys
from pathlib import Path

from spo_kernels.calls import loss_table

BEGIN, END = "<!-- losses:begin -->", "<!-- losses:end -->"
PAGE = Path(__file__).resolve().parents[1] / "spo_kernels" / "LOSSES.md"
FAMILIES = (
    ("preference_loss", loss_table.LOSS_TYPES, loss_table.PARAMETERS),
    (
        "unpaired_preference_loss",
        loss_table.UNPAIRED_LOSS_TYPES,
        loss_table.UNPAIRED_PARAMETERS,
    ),
    (
        "listwise_preference_loss",
        loss_table.LISTWISE_LOSS_TYPES,
        loss_table.LISTWISE_PARAMETERS,
    ),
)


def symbols() -> str:
    """Return the paragraph of the table's docstring that explains the formulas' symbols."""
    paragraphs = inspect.cleandoc(loss_table.__doc__).split("\n\n")
    return next(part for part in paragraphs if part.startswith("Symbols of the formulas"))


def tables() -> str:
    """Return the symbols, then two tables a family: its types, and its parameters."""
    parts = [symbols()]
    for op, rows, parameters in FAMILIES:
        default = {parameter.name: f"{parameter.default:g}" for parameter in parameters}
        lines = ["| name | formula | paper | defaults | peers |", "|---|---|---|---|---|"]
        for row in rows:
            values = ", ".join(f"{name} {default[name]}" for name in row.parameters)
            # a bar would end the cell
            formula = row.formula.replace("|", "\\|")
            cells = (f"`{row.name}`", formula, row.paper, values, ", ".join(row.peers))
            lines.append(f"| {' | '.join(cells)} |")
        meanings = ["| parameter | default | range | meaning |", "|---|---|---|---|"]
        for parameter in parameters:
            name, limits = f"`{parameter.name}`", parameter.requirement.removeprefix("be ")
            cells = (name, default[parameter.name], limits, parameter.meaning)
            meanings.append(f"| {' | '.join(cells)} |")
        parts += [f"## {op}", "\n".join(lines), "\n".join(meanings)]
    return "\n\n".join(parts)


def with_tables(text: str) -> str:
    """Return the page's text with its tables made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Rewrite the page between its markers."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
