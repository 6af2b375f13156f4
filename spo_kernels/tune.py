"""Measures a device with the op itself: rates for the planner, tiles for the tile table.

    time = units * 2 N H V / flops + bytes moved / bandwidth

Both rates are fitted to the least times of every strategy at a few shapes (what disturbs a run
only adds to it), so the bandwidth is what the op reaches between its products, not that of a bare
copy. On a GPU the tiles of ``tiles.RACED`` are timed in place of the table's, one for each kernel.
So is the product of the head's gradient, in our kernel and in the library. Nothing is stored: what
is printed are rows of ``planner._DEVICES`` and ``tiles.TILES`` and the times by which to set
``WEIGHT_KERNEL_ROWS``, which a maintainer commits.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from spo_kernels.calls import layout
from spo_kernels.ops.linear_logprob import linear_logprob
from spo_kernels.ops.linear_logprob_call import planned_device
from spo_kernels.planner.linear_logprob import device_facts, plan_linear_logprob

# (N, H, V): one where products dominate, two with few rows, one with a large H
_CPU_SHAPES = ((2048, 512, 32000), (256, 1152, 32768), (512, 2048, 16032), (64, 512, 32000))
_GPU_SHAPES = ((8192, 4096, 128256), (8192, 896, 151936), (2048, 2048, 128256))
_NEEDS = {"score": (), "direction": ("hidden",), "recompute": ("hidden", "weight")}
# rows on both sides of where the head's gradient changes its engine, and (H, V)
_ENGINE_ROWS = (512, 1024, 2048, 4096, 8192, 16384)
_ENGINE_SIZES = (4096, 128256)
_DPO_OUTPUTS = ("logps", "entropy", "mean_logits", "is_top1")
_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Point:
    """One strategy at one shape: its cost in the model's terms, and its measured time."""

    strategy: str
    rows: int
    hidden_size: int
    vocab_size: int
    flop: float
    bytes_moved: float
    measured_ms: float

    def predicted_ms(self, flops: float, bytes_per_second: float) -> float:
        return (self.flop / flops + self.bytes_moved / bytes_per_second) * 1e3


def fit(points: Sequence[Point]) -> tuple[float, float]:
    """Return (FLOP/s, bytes/s) with the least squared relative error over the points."""
    measured = np.array([[p.flop / p.measured_ms, p.bytes_moved / p.measured_ms] for p in points])
    (per_flop, per_byte), *_ = np.linalg.lstsq(measured, np.ones(len(points)), rcond=None)
    if per_flop <= 0 or per_byte <= 0:
        raise ValueError(
            "tune: times must grow with products and bytes, got a negative rate. "
            "Something else was running; try again on an idle machine."
        )
    return float(1e3 / per_flop), float(1e3 / per_byte)


def measure(device: torch.device, shapes: Sequence[tuple[int, int, int]] = ()) -> list[Point]:
    """Return the least time of each strategy at each shape: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    points = []
    for N, H, V in shapes or (_GPU_SHAPES if on_gpu else _CPU_SHAPES):
        hidden, weight, labels = _inputs(N, H, V, dtype, device)
        runs, plans = {}, {}
        for strategy, needs in _NEEDS.items():
            plan = plan_linear_logprob(
                rows=N,
                hidden_size=H,
                vocab_size=V,
                dtype=dtype,
                needs_grad=needs,
                gathered=False,
                strategy=strategy,
                device=_planned(device),
            )
            plans[strategy] = plan
            runs[strategy] = _step(strategy, needs, hidden, weight, labels)
        for strategy, values in _race(runs, device).items():
            plan = plans[strategy]
            flop = plan.gemm_units * 2.0 * N * H * V
            points.append(Point(strategy, N, H, V, flop, plan.bytes_moved, min(values)))
    return points


@dataclasses.dataclass(frozen=True)
class TileTime:
    """One tile in one row of the tile table: geometric mean of its least times at the shapes."""

    key: tuple[str, str, str, str]
    tile: Any
    measured_ms: float


def race_tiles(
    device: torch.device, shapes: Sequence[tuple[int, int, int]] = _GPU_SHAPES
) -> list[TileTime]:
    """Return the time of each raced tile: forward with DPO's outputs, or with the backward.

    The table's own row is put back; a tile changes every strategy's log-probs alike.
    """
    from spo_kernels.kernels.device import arch_of, shared_bytes
    from spo_kernels.kernels.tiles import RACED, TILES, arch_class_of

    arch_class = arch_class_of(arch_of(device), shared_bytes(device))
    found = []
    for (raced_for, loads), candidates in RACED.items():
        if raced_for != arch_class:
            continue
        for kernel, strategy in (("fwd", "direction"), ("bwd", "recompute")):
            key = (kernel, arch_class, "half", loads)
            row = TILES[key]
            try:
                for tile in candidates:
                    TILES[key] = tile
                    found.append(TileTime(key, tile, _tile_ms(strategy, shapes, device)))
            finally:
                TILES[key] = row
    return found


def race_engines(
    device: torch.device, rows: Sequence[int] = _ENGINE_ROWS, sizes: tuple[int, int] = _ENGINE_SIZES
) -> list[tuple[int, float, float]]:
    """Return (rows, ms with our kernel, ms with the library) of the head's gradient's step."""
    found = []
    before = layout.WEIGHT_KERNEL_ROWS
    try:
        for N in rows:
            times = []
            for most in (N, 0):
                # the plan counts what the engine takes
                layout.WEIGHT_KERNEL_ROWS = most
                times.append(_tile_ms("recompute", ((N, *sizes),), device))
            found.append((N, *times))
    finally:
        layout.WEIGHT_KERNEL_ROWS = before
    return found


def _tile_ms(strategy: str, shapes: Sequence[tuple[int, int, int]], device: torch.device) -> float:
    logs = []
    for N, H, V in shapes:
        hidden, weight, labels = _inputs(N, H, V, torch.bfloat16, device)
        run = _step(strategy, _NEEDS[strategy], hidden, weight, labels, outputs=_DPO_OUTPUTS)
        logs.append(math.log(min(_race({strategy: run}, device)[strategy])))
    return math.exp(sum(logs) / len(logs))


def _inputs(
    N: int, H: int, V: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(N, H, device=device).to(dtype)
    weight = (torch.randn(V, H, device=device) * H**-0.5).to(dtype)
    return hidden, weight, torch.randint(V, (N,), device=device)


def print_report(device: torch.device) -> None:
    """Measure, and print each point beside the model's answer and the row of the device table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    points = measure(device)
    flops, bandwidth = fit(points)
    table = Table(title=f"time model on {device}", box=SIMPLE_HEAD)
    table.add_column("strategy")
    for name in ("N x H x V", "measured ms", "predicted ms", "predicted / measured"):
        table.add_column(name, justify="right")
    for point in points:
        predicted = point.predicted_ms(flops, bandwidth)
        table.add_row(
            point.strategy,
            f"{point.rows} x {point.hidden_size} x {point.vocab_size}",
            f"{point.measured_ms:.1f}",
            f"{predicted:.1f}",
            f"{predicted / point.measured_ms:.2f}",
        )
    # a file or a pipe has no width of its own
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    planned = _planned(device)
    slack_mib = device_facts(planned)[1].slack_bytes >> 20
    key = planned.removeprefix("cuda:")
    print(f'"{key}": DeviceFacts({flops:.2e}, {bandwidth:.2e}, {slack_mib} * _MIB),')
    if device.type == "cuda":
        _print_tiles(race_tiles(device))
        for rows, kernel_ms, library_ms in race_engines(device):
            print(
                f"WEIGHT_KERNEL_ROWS, {rows} rows: {kernel_ms:.3f} ms, library {library_ms:.3f} ms"
            )


def _print_tiles(times: Sequence[TileTime]) -> None:
    for time_ in times:
        print(f"{time_.measured_ms:10.3f} ms  {time_.key[0]}  {time_.tile}")
    for key in dict.fromkeys(time_.key for time_ in times):
        best = min((t for t in times if t.key == key), key=lambda t: t.measured_ms)
        print(f"{key}: {best.tile},")


def _planned(device: torch.device) -> str:
    """Return the planner's name of a device; a GPU is measured with the Triton kernels."""
    return planned_device("triton" if device.type == "cuda" else "torch", device)


def _step(
    strategy: str,
    needs: Sequence[str],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    outputs: tuple[str, ...] = ("logps",),
) -> Callable[[], None]:
    hidden = hidden.detach().requires_grad_("hidden" in needs)
    weight = weight.detach().requires_grad_("weight" in needs)
    leaves = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    # bf16 is what the kernels are tuned for, on a GPU or in a test's interpreter
    backend = "triton" if hidden.dtype == torch.bfloat16 else "torch"

    def run() -> None:
        logps = linear_logprob(
            hidden,
            weight,
            labels,
            outputs=outputs,
            scored_rows=len(labels),
            strategy=strategy,
            backend=backend,
        ).logps
        if leaves:
            torch.autograd.grad(logps.sum(), leaves)

    return run


def _race(runs: dict[str, Callable[[], None]], device: torch.device) -> dict[str, list[float]]:
    """Return milliseconds of each, round-robin, the first round thrown away."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_index in range(_ROUNDS + 1):
        for name, run in runs.items():
            begin_s = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_index:
                times[name].append((time.perf_counter() - begin_s) * 1e3)
    return times
