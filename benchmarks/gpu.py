"""``python -m benchmarks.gpu``: everything measured on one GPU, in stages of falling value.

Each stage's rows are written as soon as it ends, so an interrupted run is continued by the same
command: stages that are in the result file of this GPU and commit are not run again. The default
form starts no stage after five minutes (``--seconds``); ``--long`` adds the remaining shapes and
has no limit. ``--tiny`` runs every stage on toy shapes on any device: the logic, not the numbers.
"""

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    accuracy,
    bench_degree_loss,
    bench_linear_preference_loss,
    bench_preference_loss,
    bench_train_step,
    longest,
    memory,
    providers,
    results,
    timing,
    train_step,
    workloads,
)
from benchmarks.results import Row
from benchmarks.workloads import Workload
from spo_kernels import preference_loss

_DEFAULT_S = 5 * 60
# its graphs take longer to compile than everybody's rounds to run; the other shapes are for --long
_COMPILED_SHAPE = ("trl7244", 8192)
# on a GPU an aten::item shows as what it waits in
_GPU_SYNC_NAMES = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_CPU_SYNC_NAMES = ("aten::item", "aten::nonzero")
_MEASURED = "measured pass"


@dataclasses.dataclass(frozen=True)
class Run:
    """How this run measures."""

    device: str
    tiny: bool
    long: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def command(self) -> str:
        return "python -m benchmarks.gpu" + " --long" * self.long + " --tiny" * self.tiny


Stage = tuple[str, Callable[[], list[Row]]]


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that this machine and commit still lack; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--long", action="store_true", help="the remaining shapes too; no time limit"
    )
    parser.add_argument("--tiny", action="store_true", help="toy shapes, any device")
    parser.add_argument("--fresh", action="store_true", help="run finished stages again")
    parser.add_argument(
        "--seconds", type=float, default=_DEFAULT_S, help="no stage starts later than this"
    )
    parser.add_argument("--results", type=Path, help="result file (default: by GPU and commit)")
    options = parser.parse_args(arguments)
    has_gpu = bool(torch.version.cuda) and torch.cuda.is_available()
    if not (has_gpu or options.tiny):
        print("benchmarks.gpu needs an NVIDIA GPU. --tiny runs its logic anywhere.")
        return 2
    run = Run("cuda" if has_gpu else "cpu", options.tiny, options.long)
    threads = torch.get_num_threads()
    path = options.results or results.path_for(run.device, threads)
    done = set() if options.fresh else set(results.load(path).get("stages", ()))
    begin_s, failed, late = time.monotonic(), [], []
    for name, stage in stages_of(run):
        if name in done:
            print(f"{name}: already in {path.name}", flush=True)
            continue
        if not run.long and time.monotonic() - begin_s > options.seconds:
            late.append(name)
            continue
        stage_begin_s = time.monotonic()
        try:
            rows = [{"command": run.command, **row} for row in stage()]
        # one broken stage must not cost the others their turn on the GPU
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        finally:
            _free(run)
        results.merge(path, rows, device=run.device, threads=threads, stage=name)
        print(f"{name}: {len(rows)} rows, {time.monotonic() - stage_begin_s:.1f} s", flush=True)
    if late:
        print(f"out of time, run the same command again for: {', '.join(late)}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def stages_of(run: Run) -> Iterator[Stage]:
    """Yield (name, function) of every stage, the most valuable first."""
    for dtype in ("bf16", "fp16", "fp32"):
        yield f"accuracy-{dtype}", lambda dtype=dtype: accuracy_rows(run, dtype)
    yield "launches", lambda: launch_rows(run)
    yield "preference_loss", lambda: preference_rows(run)
    grid = [workloads.TINY] if run.tiny else workloads.gpu_grid(long=run.long)
    for workload in grid:
        yield f"time-{workload.name}", lambda workload=workload: time_rows(run, workload)
    yield "degree", lambda: degree_rows(run)
    hidden, vocab = workloads.MODEL_SHAPES["llama8b"]
    # the last is one pair of 65,536 tokens each
    sizes = (8192, 32768, 131072) if run.long else (8192, 32768)
    for rows in sizes if not run.tiny else (24,):
        workload = Workload("llama8b", rows, hidden, vocab, trainable=True, peaked=True)
        if run.tiny:
            workload = dataclasses.replace(workloads.TINY, trainable=True)
        yield f"linear-pairs-{workload.name}", lambda workload=workload: pair_rows(run, workload)
    shapes = [train_step.TINY_STEP] if run.tiny else train_step.gpu_steps(long=run.long)
    for shape in shapes:
        reason = train_step.why_not(shape)
        if reason is not None:
            _show_skips(shape.workload, {"every trainer": reason})
            continue
        yield shape.workload, lambda shape=shape: step_rows(run, shape)
    if run.long or run.tiny:
        yield "longest", lambda: longest_rows(run)


def longest_rows(run: Run) -> list[Row]:
    """The longest context in 80 and 24 GB: what the planner says, and on a GPU what ran."""
    rows = []
    device = "cuda" if run.on_gpu else "cuda:sm_90"
    for case in longest.cases()[: 2 if run.tiny else None]:
        for memory_gb in longest.MEMORIES_GB:
            planned = longest.planned_rows(case, memory_gb * 10**9, device)
            row = {"kind": "longest", **dataclasses.asdict(case), "memory_gb": memory_gb}
            row |= {"workload": f"longest-{case.name}-{memory_gb}gb", "provider": "spo"}
            row |= {"planned_rows": planned, "measured_rows": None}
            has_memory = run.on_gpu and (
                torch.cuda.get_device_properties(0).total_memory >= memory_gb * 10**9
            )
            if has_memory and planned:
                row["measured_rows"] = longest.measured_rows(case, memory_gb * 10**9, planned)
            rows.append(row)
    return rows


def accuracy_rows(run: Run, dtype: str) -> list[Row]:
    """Every strategy and peer against fp64 at one small shape, TRL and ours at models' shapes."""
    names = [name for name in providers.NAMES if name not in ("torch.compile", "spo")]
    shape = workloads.TINY if run.tiny else workloads.ACCURACY
    cases = [(dataclasses.replace(shape, peaked=peaked), names, 3) for peaked in (False, True)]
    few = [name for name in names if name in ("eager", "trl") or name.startswith("spo")]
    for model in () if run.tiny else ("qwen05", "gemma1b", "llama8b"):
        shape = Workload(model, 256, *workloads.MODEL_SHAPES[model], peaked=True)
        cases.append((shape, few, 1))
    rows = []
    for shape, chosen, seeds in cases:
        for case in workloads.both_heads(dataclasses.replace(shape, dtype=dtype)):
            found, skipped = accuracy.measure(chosen, case, run.device, seeds=seeds)
            rows += found
            _show_skips(case.name, skipped)
            _free(run)
    return rows


def time_rows(run: Run, workload: Workload) -> list[Row]:
    """Time and peak of every provider on a workload, beside one bare GEMM of its unit."""
    tensors = workloads.make_tensors(workload, run.device)
    # after eight shapes of one function dynamo gives up and would time eager under another name
    torch.compiler.reset()
    runnable = []
    forced = [name for name in providers.NAMES if name.startswith("spo:") and run.long]
    peers = list(providers.PEERS)
    if not (run.long or run.tiny or (workload.shape, workload.rows) == _COMPILED_SHAPE):
        peers.remove("torch.compile")
    for name in (*peers, "spo", *forced):
        reason = providers.why_not(name, workload, run.device)
        if reason is None:
            reason = _fails(name, workload, run.device)
        if reason is None:
            runnable.append(name)
        else:
            _show_skips(workload.name, {name: reason})
    rows = []
    for which in ("forward", "forward_backward"):
        step = getattr(providers, which)
        runs = {
            name: lambda step=step, name=name: step(providers.log_probs_of(name), tensors)
            for name in runnable
        }
        peaks = {}
        for name, call in tuple(runs.items()) if run.on_gpu else ():
            try:
                peaks[name] = memory.cuda_peak_bytes(call)
            # the gate's shape is a small one: this one may not fit into the memory
            except Exception as error:
                _show_skips(workload.name, {name: providers.failure_of(name, error)})
                runs.pop(name)
        runs["gemm"] = timing.bare_gemm(tensors)
        rounds = 2 if run.tiny else 7
        times = timing.race(
            runs, rounds=rounds, warmup_rounds=2, device=run.device, flush_cache=True
        )
        for name, values in times.items():
            row = {"kind": "time", "workload": workload.name, **dataclasses.asdict(workload)}
            row |= {"provider": name, "pass": which, **timing.summary(values)}
            if name != "gemm":
                row |= providers.facts_of(name, workload, run.device)
            if name in peaks:
                returned = workload.gradient_bytes if which == "forward_backward" else 0
                row |= {"peak_bytes": peaks[name]}
                row |= {"workspace_bytes": max(0, peaks[name] - returned)}
            rows.append(row)
    return rows


def launch_rows(run: Run) -> list[Row]:
    """Kernels launched and host syncs of one forward and one backward, from torch.profiler."""
    workload = dataclasses.replace(workloads.TINY, rows=256, hidden=256, vocab=8192)
    if run.on_gpu:
        workload = dataclasses.replace(workload, dtype="bf16")
    rows = []
    for case in workloads.both_heads(workload):
        tensors = workloads.make_tensors(case, run.device)
        for name in ("spo", "trl"):
            reason = providers.why_not(name, case, run.device)
            if reason is not None:
                _show_skips(f"launches-{case.name}", {name: reason})
                continue
            log_probs = providers.log_probs_of(name)
            row = _launches(
                run, lambda f=log_probs, t=tensors: f(t), tensors.leaves, tensors.upstream
            )
            rows.append({"workload": f"launches-{case.name}", "provider": name, **row})
    margins = [torch.randn(16, device=run.device) for _ in range(4)]
    leaves = [margin.requires_grad_() for margin in margins[:2]]
    row = _launches(
        run, lambda: preference_loss(*margins).losses, leaves, torch.ones(16, device=run.device)
    )
    rows.append({"workload": "launches-preference_loss-16-pairs", "provider": "spo", **row})
    return [{"kind": "launches", **row} for row in rows]


def preference_rows(run: Run) -> list[Row]:
    """``preference_loss`` beside plain torch: time of a step, launches, time of the longest."""
    bench = bench_preference_loss
    shape = bench.TINY if run.tiny else bench.BAR
    rows = []
    for case in bench.CASES:
        runs = bench.make_runs(case, shape, run.device)
        rounds = 2 if run.tiny else 20
        times = timing.race(runs, rounds=rounds, warmup_rounds=2, device=run.device)
        rows += bench.rows_of(case, shape, times, run.device)
        tensors = bench.make_tensors(shape, run.device)
        upstream = torch.full((shape.pairs,), 1.0 / shape.pairs, device=run.device)
        for name, forward in bench.forwards_of(case, tensors).items():
            row = {"kind": "launches", "workload": f"launches-{shape.workload(case)}"}
            row |= {"provider": name, **_launches(run, forward, tensors.leaves, upstream)}
            if run.on_gpu:
                row |= _launch_times(forward, tensors.leaves, upstream, shape.steps)
            rows.append(row)
    return rows


def degree_rows(run: Run) -> list[Row]:
    """``degree_loss`` beside the log-probs of the same batch, and its forward beside a copy."""
    workload = workloads.TINY if run.tiny else workloads.gpu_grid(long=False)[0]
    runs = bench_degree_loss.make_runs(workload, run.device)
    times = timing.race(runs, rounds=5, warmup_rounds=2, device=run.device)
    rows = bench_degree_loss.rows_of(workload, times, run.device)
    shape = (96, 16) if run.tiny else (65536, 4096)
    runs = bench_degree_loss.bandwidth_runs(*shape, workloads.DTYPES[workload.dtype], run.device)
    times = timing.race(runs, rounds=7, warmup_rounds=2, device=run.device, flush_cache=True)
    return [*rows, bench_degree_loss.bandwidth_row(*shape, times, run.device)]


def pair_rows(run: Run, workload: Workload) -> list[Row]:
    """``linear_preference_loss`` beside Liger's fused DPO and eager logits: time and peak."""
    bench = bench_linear_preference_loss
    steps, peaks = {}, {}
    for name, step in bench.gated_steps(workload, run.device).items():
        try:
            peaks[name] = memory.cuda_peak_bytes(step) if run.on_gpu else 0
        except torch.cuda.OutOfMemoryError:
            if name.startswith("spo"):
                raise
            _show_skips(workload.name, {name: "out of memory"})
            continue
        steps[name] = step
    rounds = 2 if run.tiny else 5
    times = timing.race(steps, rounds=rounds, device=run.device)
    return bench.rows_of(workload, times, peaks.__getitem__, run.device)


def step_rows(run: Run, shape: train_step.StepShape) -> list[Row]:
    """A training step end to end: stock TRL DPO, ours without and with the degree loss."""
    times, peaks, tokens = {}, {}, 0
    with tempfile.TemporaryDirectory() as folder:
        # one trainer at a time: two 8B models beside each other would not leave room for the step
        for name in train_step.TRAINERS:
            step, tokens = train_step.make_step(name, shape, Path(folder))
            if run.on_gpu:
                peaks[name] = memory.cuda_peak_bytes(step)
            rounds = 2 if run.tiny else 5
            times |= timing.race({name: step}, rounds=rounds, device=run.device)
            del step
            _free(run)
    rows = bench_train_step.rows_of(shape, times, tokens)
    return [{**row, "peak_bytes": peaks.get(row["provider"])} for row in rows]


def _fails(name: str, workload: Workload, device: str) -> str | None:
    """Return why a provider that should run does not."""
    try:
        accuracy.gate(name, workload, device)
    except Exception as error:
        return providers.failure_of(name, error)
    return None


def _launches(run: Run, forward: Callable, leaves: Sequence, upstream: torch.Tensor) -> Row:
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * run.on_gpu
    torch.autograd.grad(forward(), leaves, upstream)
    counts, syncs = {}, 0
    out = None
    for which in ("forward", "backward"):
        if run.on_gpu:
            torch.cuda.synchronize()
        with profile(activities=activities) as trace, record_function(_MEASURED):
            if which == "forward":
                out = forward()
            else:
                torch.autograd.grad(out, leaves, upstream)
        events = trace.events()
        counts[f"kernels_{which}"] = sum(_is_kernel(event) for event in events)
        syncs += _host_syncs(events, _GPU_SYNC_NAMES if run.on_gpu else _CPU_SYNC_NAMES)
    return {**counts, "host_syncs": syncs}


def _launch_times(
    forward: Callable, leaves: Sequence, upstream: torch.Tensor, steps: int
) -> dict[str, float]:
    """Return microseconds on the GPU of the longest kernel and of a step, over many steps.

    From the profiler: kernels this short end before the host launches the next one.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            torch.autograd.grad(forward(), leaves, upstream)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in trace.events():
        if _is_kernel(event):
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    longest = max(statistics.median(values) for values in times.values())
    whole = sum(sum(values) for values in times.values()) / steps
    return {"launch_us": round(longest, 2), "device_us": round(whole, 2)}


def _host_syncs(events: Sequence[Any], names: Sequence[str]) -> int:
    """Count the waits of the measured pass; the profiler's own, as it ends, comes after it."""
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    (span,) = (event.time_range for event in on_host if event.name == _MEASURED)
    starts = [event.time_range.start for event in on_host if event.name in names]
    return sum(span.start <= start <= span.end for start in starts)


def _is_kernel(event: Any) -> bool:
    on_device = event.device_type == torch.autograd.DeviceType.CUDA
    return on_device and not event.name.startswith(("Memcpy", "Memset", _MEASURED))


def _show_skips(where: str, skipped: dict[str, str]) -> None:
    for name, reason in skipped.items():
        print(f"  {where}: {name} left out: {reason}", flush=True)


def _free(run: Run) -> None:
    gc.collect()
    if run.on_gpu:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(main())
