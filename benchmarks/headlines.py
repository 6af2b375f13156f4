"""The ten numbers at the front of the README, taken from the result files."""

import dataclasses

from benchmarks import bars
from benchmarks.results import Row
from benchmarks.tables import mib, ms, origin, ratio, table, worst_bars

# of the shapes measured, where our error is largest beside TRL's
_ACCURACY = "llama8b-n256-bf16-trainable-peaked"
_PAIRS = "linear-pairs-llama8b-n8192-bf16-trainable-peaked"


@dataclasses.dataclass(frozen=True)
class Headline:
    """One number: ours beside a peer's on one workload.

    ``bar`` is how the text of its bar begins, and ``case`` whose case it is where that is not the
    workload; no ``bar``: none was set.
    """

    words: str
    workload: str
    peer: str
    ours: str = "spo"
    field: str = "median_ms"
    bar: str = ""
    case: str = ""
    on_gpu: bool = True


_DIRECTION = "direction time against TRL"
HEADLINES = (
    Headline(
        "frozen head, large: H 4096, V 151,936, N 8,192",
        "trl7244-n8192-bf16-frozen-peaked",
        "trl",
        bar=_DIRECTION,
    ),
    Headline(
        "frozen head, small model: H 896, V 151,936, N 8,192",
        "qwen05-n8192-bf16-frozen-peaked",
        "trl",
        bar=_DIRECTION,
    ),
    Headline(
        "trainable head, large: H 4096, V 151,936, N 8,192",
        "trl7244-n8192-bf16-trainable-peaked",
        "trl",
        bar="resident time against TRL",
    ),
    Headline(
        "trainable head, small: H 896, V 151,936, N 2,048",
        "qwen05-n2048-bf16-trainable-peaked",
        "trl",
        bar="resident time against TRL",
    ),
    Headline(
        "`linear_preference_loss`, 4 pairs of 1,024 tokens, H 4096, V 128,256: time",
        _PAIRS,
        "liger",
        bar="time against Liger",
    ),
    Headline(
        "the same: peak memory", _PAIRS, "liger", field="peak_bytes", bar="memory against Liger"
    ),
    Headline(
        "largest log-prob error against fp64, H 4096, V 128,256, N 256",
        _ACCURACY,
        "trl",
        ours="spo:resident",
        field="max_dlogp",
        bar="max_dlogp against TRL",
        case="accuracy, bf16",
    ),
    Headline(
        "a whole DPO step without SPO, 1B LoRA, 2 pairs of 2,048 words",
        "step-1b-lora-2x2048",
        "trl",
        ours="spo gamma=0",
    ),
    Headline(
        "SPO's extra cost beside that step without it, 0.5B LoRA, 8 pairs of 256 words",
        "step-0.5b-lora-8x256",
        "spo gamma=0",
        ours="SPO's extra cost",
    ),
    Headline(
        "trainable head, fp32, H 512, V 32,000, N 2,048",
        "bar-n2048-fp32-trainable-random",
        "trl",
        bar="time against TRL",
        case="CPU, trainable head",
        on_gpu=False,
    ),
)


def render(documents: list[dict]) -> str:
    """Return the README's part: the ten numbers, what is missed, and what is unmeasured."""
    lines = [_line(headline, documents) for headline in HEADLINES]
    header = "| on | what | ours | beside | ratio | bar | |"
    notes = []
    for document in documents:
        found = bars.bars_for(document["rows"])
        met = sum(bar.met for bar in found)
        notes.append(f"{origin(document)}: {met} of {len(found)} bars are met.")
        notes += _steps_notes(document["rows"])
    promises = worst_bars(documents)
    missed = [
        f"{promise} {ratio(bar.ratio)} ({ratio(bar.limit)})"
        for promise, _, bar in promises
        if bar is not None and not bar.met
    ]
    unmeasured = [f"{promise} ({limit})" for promise, limit, bar in promises if bar is None]
    for what, found in (
        ("Missed on a GPU, the worst case of each (and its bar)", missed),
        ("Unmeasured on a GPU (and the bar)", unmeasured),
    ):
        notes.append(f"{what}: {'; '.join(found) or 'nothing'}.")
    return table(header, lines) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _steps_notes(rows: list[Row]) -> list[str]:
    """Return one sentence on every training step beside stock TRL's, none without steps."""
    steps: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "step":
            steps.setdefault(row["workload"], {})[row["provider"]] = row
    found = []
    for workload, by_provider in steps.items():
        if not {"trl", "spo gamma=0", "SPO's extra cost"} <= by_provider.keys():
            continue
        without, stock = (by_provider[name]["median_ms"] for name in ("spo gamma=0", "trl"))
        extra = by_provider["SPO's extra cost"]["note"].removesuffix(" of the step")
        found.append(f"{workload} {ratio(without / stock)} ({extra})")
    if not found:
        return []
    return [f"Whole DPO steps there against stock TRL's (SPO's extra cost): {'; '.join(found)}."]


def _line(headline: Headline, documents: list[dict]) -> str:
    for document in documents:
        by_provider = _rows_of(headline, document)
        if headline.on_gpu == ("sm" in document["machine"]) and (
            {headline.ours, headline.peer} <= by_provider.keys()
        ):
            break
    else:
        return f"| {'GPU' if headline.on_gpu else 'CPU'} | {headline.words} | | | | | unmeasured |"
    ours, peer = (by_provider[name][headline.field] for name in (headline.ours, headline.peer))
    show = {"median_ms": ms, "peak_bytes": mib, "max_dlogp": lambda error: f"{error:.1e}"}
    numbers = [show[headline.field](ours), f"{headline.peer} {show[headline.field](peer)}"]
    cells = [document["machine"]["device"], headline.words, *numbers, ratio(ours / peer)]
    return f"| {' | '.join([*cells, *_verdict(headline, document)])} |"


def _rows_of(headline: Headline, document: dict) -> dict[str, Row]:
    return {
        row["provider"]: row
        for row in document["rows"]
        if row["workload"] == headline.workload and row.get("pass") in (None, "forward_backward")
    }


def _verdict(headline: Headline, document: dict) -> tuple[str, str]:
    """Return the bar's limit, and whether it is met; a bar may be set at another size."""
    if not headline.bar:
        return "", "no bar"
    case = headline.case or f"GPU, {headline.workload}"
    for bar in bars.bars_for(document["rows"]):
        if bar.case == case and bar.what.startswith(headline.bar):
            return ratio(bar.limit), "met" if bar.met else f"**missed**: {bar.cause}"
    for (promise, limit, worst), (_, _, what) in zip(
        worst_bars([document]), bars.GPU_PROMISES, strict=True
    ):
        if what == headline.bar:
            elsewhere = "unmeasured" if worst is None else ratio(worst.ratio)
            return "", f"no bar at this size; {promise} ({limit}): {elsewhere}"
    return "", "no bar"
