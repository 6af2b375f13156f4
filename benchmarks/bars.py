"""The bars of the design as arithmetic on result rows: ratio, limit, met or missed."""

import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatch

from benchmarks.results import Row

_FROZEN, _TRAINABLE = "frozen head", "trainable head"
# what one launch of preference_loss may take at 16 pairs of 512 tokens
LAUNCH_US = 20.0

# every promise about a GPU, its limits in words, and how the text of its bars begins: a promise no
# row of the results answers is unmeasured
GPU_PROMISES = (
    ("frozen head, time against TRL", "0.70x, 0.72x below H 2048", "direction time against TRL"),
    ("frozen head, fp16, time against TRL", "0.75x, 0.80x below H 2048", "fp16 time against TRL"),
    ("resident, time against TRL", "0.80x, 0.85x below H 2048", "resident time against TRL"),
    ("recompute, time against TRL", "1.00x, 1.05x below H 2048", "recompute time against TRL"),
    ("recompute, workspace against TRL", "0.6x", "workspace against TRL"),
    ("recompute, workspace against TRL, N 131072", "0.85x", "workspace at N 131072 against TRL"),
    ("workspace against the plan", "1.00x", "workspace against the plan"),
    ("bf16 log-probs, error against TRL's", "0.001x", "max_dlogp against TRL"),
    ("log-probs against a bare GEMM", "1.15x, 1.4x below H 2048", "forward against"),
    ("TRL's DPO outputs against a bare GEMM", "1.25x, 1.5x below H 2048", "DPO outputs against"),
    ("forward + backward against its GEMMs", "1.2x, 1.5x below H 2048", "forward_backward against"),
    ("N = 256, time against eager", "1.00x", "time against eager"),
    ("linear_preference_loss, time against Liger", "1.00x", "time against Liger"),
    (
        "linear_preference_loss, memory against Liger, 16k tokens a sequence",
        "0.25x",
        "memory against Liger",
    ),
    ("linear_preference_loss, time against quack", "1.05x", "time against quack"),
    ("preference_loss, launches forward", "1", "launches forward"),
    ("preference_loss, launches backward", "1", "launches backward"),
    ("preference_loss, host syncs", "0", "host syncs"),
    ("preference_loss, longest launch", "20 us", "longest launch against"),
    ("degree_loss beside linear_logprob", "1.03x", "degree_loss beside linear_logprob"),
    ("degree_loss forward, time against a copy's bytes", "1 / 0.7", "hidden states read against"),
)

# largest error against fp64, by output and dtype
ACCURACY_LIMITS = {
    "max_dlogp": {"fp32": 2e-5, "bf16": 2e-5, "fp16": 2e-5},
    "rel_dh": {"fp32": 2e-6, "bf16": 2.7e-3, "fp16": 3.3e-4},
    "rel_dw": {"fp32": 2e-6, "bf16": 2.7e-3, "fp16": 3.3e-4},
}


_HOST = "the host: the checks, launches and small ops of a call, for which the GPU waits"
_CHUNKS = "the host: the default budget cuts N into many row chunks, each with launches of its own"
_EPILOGUE = (
    "each tile's epilogue, under which no product runs, and the pipeline's fill at each tile"
)
_BUDGET = "the default budget is as large as TRL's workspace, and the planner spends it on time"
_FIXED = "a fixed cost a call: argument checks, fp64 sums, rewards and slopes; eager has none of it"
_PRODUCTS = (
    "four bare products of recompute are above it; three of resident are over the memory bar"
)
# why a bar is missed, by patterns of its case and its text; the first that fits
CAUSES = (
    ("CPU, preference_loss *", "time against eager", _FIXED),
    ("CPU, trainable head", "time against TRL", _PRODUCTS),
    ("GPU, *", "workspace against TRL", _BUDGET),
    ("GPU, *", "workspace against the plan", "not looked into"),
    ("GPU, *-n256-*", "*", _HOST),
    ("GPU, *-n2048-*", "*", _HOST),
    ("GPU, degree-*", "*", _HOST),
    ("GPU, *-n8192-*", "forward against *", _EPILOGUE),
    ("GPU, qwen05-n8192-*-frozen-*", "*", _CHUNKS),
    ("GPU, *-n8192-*", "*", _EPILOGUE),
)


@dataclasses.dataclass(frozen=True)
class Bar:
    """One promise: a ratio of two measured numbers and its limit; ``detail`` is measured too."""

    case: str
    what: str
    ratio: float
    limit: float
    detail: str = ""

    @property
    def met(self) -> bool:
        return self.ratio <= self.limit

    @property
    def cause(self) -> str:
        """What is known of why the bar is missed, "" where it is met."""
        if self.met:
            return ""
        fits = (
            c for case, what, c in CAUSES if fnmatch(self.case, case) and fnmatch(self.what, what)
        )
        return next(fits, "not looked into") + (f" ({self.detail})" if self.detail else "")


def bars_for(rows: Iterable[Row]) -> list[Bar]:
    """Return every bar the rows can answer."""
    rows = list(rows)
    return [*cpu_bars(rows), *gpu_bars(rows), *accuracy_bars(rows)]


def cpu_bars(rows: Iterable[Row]) -> list[Bar]:
    """Return the bars of the CPU backend from interleaved runs at the bars' shapes."""
    rows = list(rows)
    runs = {
        (row["trainable"], row["dtype"], row["provider"]): row
        for row in rows
        if row["kind"] == "bar" and row["shape"] == "bar"
    }
    # limits against TRL's time and against eager's
    limits = {False: (0.35, 1.0), True: (0.5, 1.2)}
    bars = []
    for trainable, (trl_limit, eager_limit) in limits.items():
        case = f"CPU, {_TRAINABLE if trainable else _FROZEN}"
        ours = runs.get((trainable, "fp32", "spo"))
        trl = runs.get((trainable, "fp32", "trl"))
        eager = runs.get((trainable, "fp32", "eager"))
        half = runs.get((trainable, "bf16", "spo"))
        if ours and trl:
            bars.append(_bar(case, "time against TRL", "median_ms", ours, trl, trl_limit))
            bars.append(_bar(case, "memory against TRL", "peak_bytes", ours, trl, 0.1))
        if ours and eager:
            bars.append(_bar(case, "time against eager", "median_ms", ours, eager, eager_limit))
            bars.append(_bar(case, "memory against eager", "peak_bytes", ours, eager, 0.25))
        if ours and half:
            bars.append(_bar(case, "bf16 against fp32 time", "median_ms", half, ours, 1.1))
    for row in rows:
        if row["kind"] == "pairs" and row["shape"] == "bar" and row["device"] == "cpu":
            if row["provider"] == "spo":
                case = f"CPU, preference_loss {row['case']}"
                bars.append(Bar(case, "time against eager", row["ratio"], 1.0))
    return bars


def gpu_bars(rows: Iterable[Row]) -> list[Bar]:
    """Return the bars of the Triton backend: time and memory against TRL, eager and bare GEMMs.

    And those of ``preference_loss``: one launch each way, none of them long, no host sync; and of
    ``degree_loss``: what it adds to the log-probs, and how fast it reads the hidden states.
    """
    rows = list(rows)
    runs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "time":
            runs.setdefault((row["workload"], row["pass"]), {})[row["provider"]] = row
    bars = []
    for (workload, which), by_provider in runs.items():
        ours = by_provider.get("spo")
        if ours is None:
            continue
        small, case = ours["hidden"] < 2048, f"GPU, {workload}"
        units = ours["gemm_units"] if which == "forward_backward" else 1
        unit, beyond = by_provider.get("gemm"), ""
        if unit is not None:
            bare_ms = units * unit["median_ms"]
            beyond = f"{ours['median_ms'] - bare_ms:.1f} ms beyond the bare products"
            limits = (1.2, 1.5) if which == "forward_backward" else (1.15, 1.4)
            what = f"{which} against {units} bare GEMM{'s' * (units > 1)}"
            bars.append(Bar(case, what, ours["median_ms"] / bare_ms, limits[small], beyond))
        if which != "forward_backward":
            continue
        bars += _against_trl(case, ours, by_provider.get("trl"), small, beyond)
        if "workspace_bytes" in ours:
            over = (ours["workspace_bytes"] - ours["planned_bytes"]) / 2**20
            ratio = ours["workspace_bytes"] / ours["planned_bytes"]
            bars.append(Bar(case, "workspace against the plan", ratio, 1.0, f"{over:.1f} MiB more"))
        if ours["rows"] == 256 and "eager" in by_provider:
            eager = by_provider["eager"]
            bars.append(_bar(case, "time against eager", "median_ms", ours, eager, 1.0, beyond))
    pairs = {
        (row["workload"], row["provider"]): row
        for row in rows
        if row["kind"] == "linear_pairs" and row.get("device") == "cuda"
    }
    for (workload, provider), ours in pairs.items():
        if provider != "spo":
            continue
        case = f"GPU, {workload}"
        quack = pairs.get((workload, "quack"))
        if quack is not None:
            bars.append(_bar(case, "time against quack", "median_ms", ours, quack, 1.05))
        liger = pairs.get((workload, "liger"))
        if liger is None:
            continue
        bars.append(_bar(case, "time against Liger", "median_ms", ours, liger, 1.0))
        # the bar is set at 16k tokens a sequence
        if ours["rows"] // (2 * ours["pairs"]) >= 16384:
            bars.append(_bar(case, "memory against Liger", "peak_bytes", ours, liger, 0.25))
    for row in rows:
        if row["kind"] == "degree" and row.get("device") == "cuda":
            case = f"GPU, {row['workload']}"
            if "beside" in row:
                bars.append(Bar(case, "degree_loss beside linear_logprob", row["beside"], 1.03))
            if "copy_share" in row:
                what = "hidden states read against a copy's bandwidth"
                bars.append(Bar(case, what, 1 / row["copy_share"], 1 / 0.7))
        if row["kind"] == "launches" and row["provider"] == "spo" and "launch_us" in row:
            case = f"GPU, {row['workload']}"
            for which in ("forward", "backward"):
                bars.append(Bar(case, f"launches {which}", row[f"kernels_{which}"], 1.0))
            bars.append(Bar(case, "host syncs", row["host_syncs"], 0.0))
            what = f"longest launch against {LAUNCH_US:g} us"
            bars.append(Bar(case, what, row["launch_us"] / LAUNCH_US, 1.0))
    return bars


def accuracy_bars(rows: Iterable[Row]) -> list[Bar]:
    """Return the accuracy bars: worst error of ours over the limit, and over TRL's error."""
    rows = [row for row in rows if row["kind"] == "accuracy"]
    trl = {row["workload"]: row["max_dlogp"] for row in rows if row["provider"] == "trl"}
    against_trl = [
        row["max_dlogp"] / trl[row["workload"]]
        for row in rows
        if row["provider"].startswith("spo") and row["dtype"] == "bf16" and row["workload"] in trl
    ]
    # the limits are those of one shape
    rows = [row for row in rows if row["shape"] == "accuracy"]
    worst: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["provider"].startswith("spo"):
            for name in ACCURACY_LIMITS:
                if row[name] is not None:
                    key = (row["dtype"], name)
                    worst[key] = max(worst.get(key, 0.0), row[name])
    bars = [
        Bar(
            f"accuracy, {dtype}",
            f"{name} against {ACCURACY_LIMITS[name][dtype]:.1e}",
            value,
            ACCURACY_LIMITS[name][dtype],
        )
        for (dtype, name), value in sorted(worst.items())
    ]
    if against_trl:
        bars.append(Bar("accuracy, bf16", "max_dlogp against TRL's", max(against_trl), 1e-3))
    return bars


def _against_trl(case: str, ours: Row, trl: Row | None, small: bool, beyond: str) -> list[Bar]:
    if trl is None:
        return []
    time_limits = {
        "direction": (0.70, 0.72),
        "resident": (0.80, 0.85),
        "recompute": (1.00, 1.05),
    }
    limit, what = time_limits[ours["strategy"]][small], f"{ours['strategy']} time against TRL"
    if ours["strategy"] == "direction" and ours["dtype"] == "fp16":
        limit, what = (0.75, 0.80)[small], "fp16 time against TRL"
    bars = [_bar(case, what, "median_ms", ours, trl, limit, beyond)]
    if ours["strategy"] == "recompute" and "workspace_bytes" in ours:
        many = ours["rows"] >= 131072
        what = "workspace at N 131072 against TRL" if many else "workspace against TRL"
        bars.append(_bar(case, what, "workspace_bytes", ours, trl, 0.85 if many else 0.6))
    return bars


def _bar(
    case: str, what: str, name: str, ours: Row, other: Row, limit: float, detail: str = ""
) -> Bar:
    return Bar(case, what, ours[name] / other[name], limit, detail)
