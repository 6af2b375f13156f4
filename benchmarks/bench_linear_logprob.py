"""``linear_logprob`` beside its peers: time and peak memory per workload, and the CPU bar.

Every provider of a workload gets the same tensors and passes a gate against fp64 first. The bar is
timed round-robin, since its ratios must hold on a machine that others use too.
"""

import dataclasses

import pytest
import torch

from benchmarks import accuracy, memory, providers, timing, workloads
from benchmarks.workloads import Workload

_ON_GPU = bool(torch.version.cuda) and torch.cuda.is_available()
_GRID = workloads.gpu_grid(long=False) if _ON_GPU else workloads.cpu_grid()
_GRID_NAMES = [name for name in providers.NAMES if not name.startswith("spo:")]
_BAR_PROVIDERS = ("eager", "trl", "torch.lce", "spo")


@pytest.mark.parametrize("provider", _GRID_NAMES)
@pytest.mark.parametrize("workload", _GRID, ids=lambda workload: workload.name)
@pytest.mark.parametrize("which", ["forward", "forward_backward"])
def test_grid(benchmark, record, setting, which: str, workload: Workload, provider: str) -> None:
    if setting.tiny:
        workload = dataclasses.replace(workloads.TINY, trainable=workload.trainable)
    reason = providers.why_not(provider, workload, setting.device)
    if reason:
        pytest.skip(reason)
    accuracy.gate(provider, workload, setting.device)
    log_probs = providers.log_probs_of(provider)
    tensors = workloads.make_tensors(workload, setting.device)
    step = getattr(providers, which)

    def run() -> None:
        step(log_probs, tensors)
        if setting.device.startswith("cuda"):
            torch.cuda.synchronize()

    benchmark.group = f"{workload.name} {which}"
    benchmark.pedantic(run, rounds=setting.rounds, warmup_rounds=1)
    row = {"kind": "grid", "workload": workload.name, **dataclasses.asdict(workload)}
    row |= {"provider": provider, "pass": which}
    row |= providers.facts_of(provider, workload, setting.device)
    row |= timing.summary([seconds * 1e3 for seconds in benchmark.stats.stats.data])
    record(**row)


@pytest.mark.skipif(_ON_GPU, reason="the CPU bar; python -m benchmarks.gpu has the GPU's")
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_cpu_bar(benchmark, record, setting, trainable: bool) -> None:
    shape = workloads.TINY if setting.tiny else workloads.BAR
    workload = dataclasses.replace(shape, trainable=trainable)
    half = dataclasses.replace(workload, dtype="bf16")
    cases = [(name, workload) for name in _BAR_PROVIDERS] + [("spo", half)]
    _race(benchmark, record, setting, "bar", cases)


@pytest.mark.skipif(_ON_GPU, reason="N scaled down; python -m benchmarks.gpu --long has the GPU's")
@pytest.mark.parametrize("workload", workloads.cpu_sweep(), ids=lambda workload: workload.name)
def test_cpu_sweep(benchmark, record, setting, workload: Workload) -> None:
    if setting.tiny:
        workload = dataclasses.replace(workloads.TINY, trainable=workload.trainable)
    cases = [(name, workload) for name in _BAR_PROVIDERS]
    _race(benchmark, record, setting, "sweep", cases)


def _race(benchmark, record, setting, kind: str, cases: list[tuple[str, Workload]]) -> None:
    """Time the cases round-robin beside one bare product, and measure each one's peak."""
    runs = {}
    for provider, case in cases:
        if providers.why_not(provider, case, "cpu") is None:
            accuracy.gate(provider, case, "cpu")
            runs[provider, case] = _forward_backward_of(provider, case)
    first = cases[0][1]
    runs["gemm", first] = timing.bare_gemm(workloads.make_tensors(first, "cpu"))
    times = {key: [] for key in runs}

    def one_round() -> None:
        for key, run in runs.items():
            times[key].append(timing.time_once(run, "cpu"))

    benchmark.group = f"{first.name} {kind}"
    benchmark.pedantic(one_round, rounds=setting.rounds, warmup_rounds=1)
    for (provider, case), times_ms in times.items():
        row = {"kind": kind, "workload": case.name, **dataclasses.asdict(case)}
        row |= {"provider": provider, "pass": "forward_backward"}
        row |= providers.facts_of(provider, case, "cpu")
        # the first round is the warm-up
        row |= timing.summary(times_ms[1:])
        if provider != "gemm":
            peak = memory.peak_bytes(provider, case, "cpu", threads=setting.threads)
            row |= {"peak_bytes": peak, "workspace_bytes": max(0, peak - case.gradient_bytes)}
        if provider == "spo":
            row["tensor_bytes"] = memory.workspace_bytes(runs[provider, case])
        record(**row)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("peaked", [False, True], ids=["random", "peaked"])
def test_accuracy(benchmark, record, setting, dtype: str, peaked: bool) -> None:
    # one round: --benchmark-only leaves out whatever is not timed
    shape = workloads.TINY if setting.tiny else workloads.ACCURACY
    workload = dataclasses.replace(shape, dtype=dtype, peaked=peaked)
    benchmark.group = "accuracy"

    def measure_both() -> list:
        found = []
        for case in workloads.both_heads(workload):
            names = [name for name in providers.NAMES if name not in ("torch.compile", "spo")]
            found += accuracy.measure(names, case, setting.device, seeds=3)[0]
        return found

    for row in benchmark.pedantic(measure_both, rounds=1):
        record(**row)


def _forward_backward_of(provider: str, workload: Workload):
    log_probs = providers.log_probs_of(provider)
    tensors = workloads.make_tensors(workload, "cpu")
    return lambda: providers.forward_backward(log_probs, tensors)
