"""What the planner's time model needs of a device, measured with the op that it plans.

    time = units * 2 N H V / flops + bytes moved / bandwidth

Both rates are fitted to measured times of every strategy at a few shapes, so the bandwidth is what
the op reaches between its products, not that of a bare copy. Nothing is stored: the row printed is
one of ``planner._DEVICES``, which a maintainer commits.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from spo_kernels._linear_inputs import planned_device
from spo_kernels.linear_logprob import linear_logprob
from spo_kernels.planner import Plan, device_facts, plan_linear_logprob

# (N, H, V): one where products dominate, one with few rows, one with a small H
_CPU_SHAPES = ((2048, 512, 32000), (256, 1152, 32768), (512, 2048, 16032))
_GPU_SHAPES = ((8192, 4096, 128256), (8192, 896, 151936), (2048, 2048, 128256))
_NEEDS = {"score": (), "direction": ("hidden",), "recompute": ("hidden", "weight")}
_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Point:
    """One strategy at one shape: what it costs in the model's terms, and its measured time."""

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
    """Return the median time of each strategy at each shape: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    points = []
    for N, H, V in shapes or (_GPU_SHAPES if on_gpu else _CPU_SHAPES):
        hidden = torch.randn(N, H, device=device).to(dtype)
        weight = (torch.randn(V, H, device=device) * H**-0.5).to(dtype)
        labels = torch.randint(V, (N,), device=device)
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
            runs[strategy] = _step(plan, needs, hidden, weight, labels)
        for strategy, values in _race(runs, device).items():
            plan = plans[strategy]
            flop = plan.gemm_units * 2.0 * N * H * V
            points.append(
                Point(strategy, N, H, V, flop, plan.bytes_moved, statistics.median(values))
            )
    return points


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


def _planned(device: torch.device) -> str:
    """Return the planner's name of a device; a GPU is measured with the Triton kernels."""
    return planned_device("triton" if device.type == "cuda" else "torch", device)


def _step(
    plan: Plan,
    needs: Sequence[str],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
) -> Callable[[], None]:
    hidden = hidden.detach().requires_grad_("hidden" in needs)
    weight = weight.detach().requires_grad_("weight" in needs)
    leaves = [tensor for tensor in (hidden, weight) if tensor.requires_grad]

    def run() -> None:
        out = linear_logprob(
            hidden, weight, labels, scored_rows=plan.rows, strategy=plan.strategy
        ).logps
        if leaves:
            torch.autograd.grad(out.sum(), leaves)

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
