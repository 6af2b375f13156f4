"""Time several callables round-robin, so that noise of the machine hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.workloads import Tensors

# twice the second-level cache of the largest GPU we know: writing it evicts the inputs
_FLUSH_BYTES = 256 << 20


def race(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup_rounds: int = 1,
    device: str = "cpu",
    flush_cache: bool = False,
) -> dict[str, list[float]]:
    """Return milliseconds per round of each callable; one round runs every callable once."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    flush = None
    if flush_cache and device.startswith("cuda"):
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    for round_index in range(warmup_rounds + rounds):
        for name, run in runs.items():
            if flush is not None:
                flush.fill_(round_index)
            elapsed_ms = time_once(run, device)
            if round_index >= warmup_rounds:
                times[name].append(elapsed_ms)
    return times


def time_once(run: Callable[[], Any], device: str) -> float:
    """Return the milliseconds of one call: CUDA events on a GPU, the wall clock elsewhere."""
    if device.startswith("cuda"):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    begin_s = time.perf_counter()
    run()
    return (time.perf_counter() - begin_s) * 1e3


def summary(times_ms: list[float]) -> dict[str, float | int]:
    """Return the numbers a result row keeps of its rounds."""
    return {
        "median_ms": round(statistics.median(times_ms), 4),
        "min_ms": round(min(times_ms), 4),
        "rounds": len(times_ms),
    }


def bare_gemm(tensors: Tensors) -> Callable[[], None]:
    """One unit without anything around it: the logits, 8192 rows at a time, thrown away."""
    hidden, weight = tensors.hidden.detach(), tensors.weight.detach()
    rows = min(8192, hidden.shape[0])
    logits = torch.empty(rows, weight.shape[0], dtype=hidden.dtype, device=hidden.device)

    def run() -> None:
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows]
            torch.mm(part, weight.t(), out=logits[: part.shape[0]])

    return run
