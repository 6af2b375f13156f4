"""``python -m benchmarks.losses``: the loss table -> the README's tables of loss types."""

import sys
from pathlib import Path

from spo_kernels.calls import loss_table

BEGIN, END = "<!-- losses:begin -->", "<!-- losses:end -->"
README = Path(__file__).resolve().parents[1] / "README.md"
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


def tables() -> str:
    """Return one table a family: name, formula, paper, defaults and the peers that have it."""
    parts = []
    for op, rows, parameters in FAMILIES:
        default = {parameter.name: f"{parameter.default:g}" for parameter in parameters}
        lines = [
            f"`{op}`",
            "",
            "| name | formula | paper | defaults | peers |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            values = ", ".join(f"{name} {default[name]}" for name in row.parameters)
            # a bar would end the cell
            formula = row.formula.replace("|", "\\|")
            cells = (f"`{row.name}`", formula, row.paper, values, ", ".join(row.peers))
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def with_tables(text: str) -> str:
    """Return the README's text with its tables made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Rewrite the README between its markers."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
