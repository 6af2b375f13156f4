"""The benchmarks run on toy shapes: providers, gate, memory, result files, report, GPU stages."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    accuracy,
    bars,
    bench_degree_loss,
    bench_linear_preference_loss,
    bench_preference_loss,
    gpu,
    headlines,
    longest,
    memory,
    plots,
    providers,
    report,
    results,
    tables,
    workloads,
)

_ROOT = results.ROOT
_RUNNABLE = [name for name in providers.NAMES if not providers.why_not(name, workloads.TINY, "cpu")]


@pytest.mark.parametrize("name", _RUNNABLE)
def test_providers_agree_with_fp64(name):
    for dtype in ("fp32", "bf16"):
        accuracy.gate(name, dataclasses.replace(workloads.TINY, dtype=dtype, peaked=True), "cpu")


def test_gate_refuses_a_wrong_provider(monkeypatch):
    right = providers.log_probs_of("eager")
    monkeypatch.setitem(providers._LOG_PROBS, "eager", lambda tensors: right(tensors) * 1.01)
    with pytest.raises(AssertionError, match="eager on tiny.*max_dlogp is"):
        accuracy.gate("eager", workloads.TINY, "cpu")


def test_a_provider_that_cannot_run_says_why():
    assert "Triton only" in providers.why_not("liger", workloads.TINY, "cpu")
    trainable = dataclasses.replace(workloads.TINY, trainable=True)
    assert "cannot give the gradients" in providers.why_not("spo:direction", trainable, "cpu")
    assert {"eager", "spo", "spo:direction"} <= set(_RUNNABLE)


def test_peaked_inputs_are_peaked():
    shape = dataclasses.replace(workloads.ACCURACY, rows=64, vocab=2048, dtype="fp32")
    spread = {}
    for peaked in (False, True):
        tensors = workloads.make_tensors(dataclasses.replace(shape, peaked=peaked), "cpu")
        spread[peaked] = (tensors.hidden @ tensors.weight.T).std().item()
        again = workloads.make_tensors(dataclasses.replace(shape, peaked=peaked), "cpu")
        assert torch.equal(tensors.hidden, again.hidden)
        assert torch.equal(tensors.labels, again.labels)
    assert spread[False] == pytest.approx(1.0, rel=0.1)
    assert spread[True] == pytest.approx(5.7, rel=0.1)


def test_memory_of_a_fresh_process_counts_the_logits():
    workload = workloads.Workload("memory", 512, 16, 16384, "fp32")
    peak = memory.peak_bytes("eager", workload, "cpu", threads=1)
    logits = 4 * workload.rows * workload.vocab
    assert 1.5 * logits < peak < 8 * logits
    module = bench_linear_preference_loss.__name__
    workload = dataclasses.replace(workload, trainable=True)
    peak = memory.process_peak_bytes(module, "eager", workload, threads=1)
    assert 1.5 * logits < peak < 8 * logits


def test_bars():
    def row(provider, dtype, ms, peak):
        return {
            "kind": "bar",
            "shape": "bar",
            "trainable": False,
            "dtype": dtype,
            "provider": provider,
            "median_ms": ms,
            "peak_bytes": peak,
        }

    rows = [row("eager", "fp32", 100.0, 1000), row("trl", "fp32", 400.0, 3000)]
    rows += [row("spo", "fp32", 90.0, 200), row("spo", "bf16", 110.0, 200)]
    found = {bar.what: (round(bar.ratio, 3), bar.met) for bar in bars.cpu_bars(rows)}
    assert found == {
        "time against TRL": (0.225, True),
        "memory against TRL": (0.067, True),
        "time against eager": (0.9, True),
        "memory against eager": (0.2, True),
        "bf16 against fp32 time": (1.222, False),
    }


def test_bars_of_a_gpu():
    """Times beside TRL's and the bare products; a dtype or a size may have a limit of its own."""
    row = {"kind": "time", "workload": "w", "pass": "forward_backward", "hidden": 4096}
    row |= {"workspace_bytes": 100, "planned_bytes": 100}

    def found(strategy, units, **changes):
        ours = {**row, "provider": "spo", "strategy": strategy, "gemm_units": units, **changes}
        rows = [{**ours, "median_ms": 9.0}, {**ours, "provider": "trl", "median_ms": 12.0}]
        rows.append({**ours, "provider": "gemm", "median_ms": 4.0})
        return {bar.what: (bar.ratio, bar.met, bar.detail) for bar in bars.gpu_bars(rows)}

    direction = found("direction", 2, rows=8192, dtype="bf16")
    beyond = "1.0 ms beyond the bare products"
    assert direction["direction time against TRL"] == (0.75, False, beyond)
    assert direction["forward_backward against 2 bare GEMMs"] == (1.125, True, beyond)
    assert direction["workspace against the plan"][:2] == (1.0, True)
    half = found("direction", 2, rows=8192, dtype="fp16")
    assert half["fp16 time against TRL"] == (0.75, True, beyond)
    many = found("recompute", 4, rows=131072, dtype="bf16")
    assert many["workspace at N 131072 against TRL"][:2] == (1.0, False)
    assert "workspace against TRL" in found("recompute", 4, rows=8192, dtype="bf16")
    # every promise about a GPU is found by the text of its bars, each by one
    for what in (*direction, *half, *many):
        assert sum(what.startswith(begin) for _, _, begin in bars.GPU_PROMISES) == 1


def test_bars_of_preference_loss():
    row = {"kind": "pairs", "shape": "bar", "case": "ipo", "provider": "spo", "ratio": 1.25}
    on_cpu, on_gpu = ({**row, "device": device} for device in ("cpu", "cuda"))
    (bar,) = bars.cpu_bars([on_cpu, on_gpu])
    assert "fixed cost" in bar.cause and bar.cause in report.bar_line(bar)
    assert not bars.Bar(bar.case, bar.what, 0.9, 1.0).cause
    found = [(bar.what, bar.ratio, bar.met)]
    assert found == [("time against eager", 1.25, False)]
    row = {"kind": "launches", "workload": "w", "provider": "spo", "host_syncs": 1}
    row |= {"kernels_forward": 1, "kernels_backward": 2, "launch_us": 5.0}
    found = {bar.what: (bar.ratio, bar.met) for bar in bars.gpu_bars([row])}
    assert found == {
        "launches forward": (1, True),
        "launches backward": (2, False),
        "host syncs": (1, False),
        "longest launch against 20 us": (0.25, True),
    }


def test_bar_of_accuracy_against_trl():
    """At every shape; a missing TRL gives no bar."""
    row = {"kind": "accuracy", "shape": "qwen05", "workload": "w", "dtype": "bf16"}
    rows = [{**row, "provider": "trl", "max_dlogp": 0.05}]
    rows += [{**row, "provider": f"spo:{name}", "max_dlogp": 1e-6} for name in ("a", "b")]
    rows[-1]["max_dlogp"] = 1e-4
    (bar,) = bars.accuracy_bars(rows)
    assert (bar.what, bar.ratio, bar.met) == ("max_dlogp against TRL's", pytest.approx(2e-3), False)
    assert bars.accuracy_bars(rows[1:]) == []


def test_bars_of_linear_preference_loss():
    row = {"kind": "linear_pairs", "workload": "w", "pairs": 1, "rows": 32768, "device": "cuda"}
    rows = [{**row, "provider": "liger", "median_ms": 10.0, "peak_bytes": 100}]
    rows.append({**row, "provider": "spo", "median_ms": 9.0, "peak_bytes": 30})
    found = {bar.what: (bar.ratio, bar.met) for bar in bars.gpu_bars(rows)}
    quack = {**row, "provider": "quack", "median_ms": 6.0, "peak_bytes": 30}
    assert bars.gpu_bars([*rows, quack])[0].ratio == 1.5
    assert found == {"time against Liger": (0.9, True), "memory against Liger": (0.3, False)}
    assert not bars.gpu_bars([{**row, "device": "cpu"} for row in rows])


def test_bars_of_degree_loss():
    times = {"spo": [2.0], "copy": [3.0]}
    row = bench_degree_loss.bandwidth_row(8, 4, times, "cuda:0")
    assert row["copy_share"] == 0.75
    beside = {"kind": "degree", "workload": "w", "provider": "spo", "beside": 1.04}
    found = [
        (round(bar.ratio, 4), bar.met)
        for bar in bars.gpu_bars([row, {**beside, "device": "cuda"}, {**beside, "device": "cpu"}])
    ]
    assert found == [(1.3333, True), (1.04, False)]


def test_pytest_session_writes_rows(tmp_path):
    path = tmp_path / "rows.json"
    files = [
        f"benchmarks/bench_{op}.py"
        for op in ("linear_logprob", "preference_loss", "linear_preference_loss")
    ]
    command = [sys.executable, "-m", "pytest", *files, "-q", "--tiny"]
    command += ["--benchmark-only", "--results", str(path), "--threads", "1"]
    chosen = "test_grid and qwen05 and frozen and (eager or spo)"
    command += [
        "-p",
        "no:cacheprovider",
        "-k",
        f"({chosen}) or test_preference_loss or test_linear",
    ]
    # a worker of a parallel test run must not pass its role on: it would switch benchmarks off
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    document = json.loads(path.read_text())
    linear = [row for row in document["rows"] if row["kind"] == "linear_pairs"]
    pair_bench = bench_linear_preference_loss
    runnable = [name for name in pair_bench.PROVIDERS if not pair_bench.why_not(name, "cpu")]
    assert {row["provider"] for row in linear} == set(runnable) and "quack" not in runnable
    others = [row for row in document["rows"] if row["kind"] != "linear_pairs"]
    assert {row["provider"] for row in others} == {"eager", "spo"}
    grid = [row for row in document["rows"] if row["kind"] == "grid"]
    assert {row["pass"] for row in grid} == {"forward", "forward_backward"}
    pairs = [row for row in document["rows"] if row["kind"] == "pairs"]
    assert {row["case"] for row in pairs} == set(bench_preference_loss.CASES)
    assert all("ratio" in row for row in pairs if row["provider"] == "spo")
    assert all(row["median_ms"] > 0 and row["command"] for row in document["rows"])
    assert document["machine"]["device"] and str(_ROOT) not in path.read_text()


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory):
    """The file of a run of every GPU stage but the training step, on toy shapes."""
    path = tmp_path_factory.mktemp("gpu") / "toy-gpu.json"
    run = gpu.Run("cpu", tiny=True, long=False)
    for name, stage in gpu.stages_of(run):
        if name.startswith(
            ("time", "launches", "preference", "linear-pairs", "degree", "accuracy-bf16")
        ):
            rows = [{"command": run.command, **row} for row in stage()]
            results.merge(path, rows, device="cpu", threads=1, stage=name)
    return path


def test_gpu_stages(gpu_results, capsys, monkeypatch):
    document = results.load(gpu_results)
    kinds = {"time", "launches", "pairs", "linear_pairs", "degree", "accuracy"}
    assert {row["kind"] for row in document["rows"]} == kinds
    # a restart runs what is missing and nothing else
    monkeypatch.setattr(gpu, "stages_of", lambda run: [("degree", None), ("new", lambda: [])])
    assert gpu.main(["--tiny", "--results", str(gpu_results)]) == 0
    assert "degree: already in" in capsys.readouterr().out
    assert "new" in results.load(gpu_results)["stages"]
    monkeypatch.setattr(gpu, "stages_of", lambda run: [("broken", lambda: 1 / 0)])
    assert gpu.main(["--tiny", "--results", str(gpu_results)]) == 1


def test_a_new_measurement_replaces_the_old_one(tmp_path):
    path = tmp_path / "rows.json"
    row = {"kind": "time", "workload": "w", "provider": "spo", "pass": "forward", "median_ms": 1.0}
    for median in (1.0, 2.0):
        results.merge(path, [{**row, "median_ms": median}], device="cpu", threads=1)
    assert [row["median_ms"] for row in results.load(path)["rows"]] == [2.0]


def test_report(gpu_results, tmp_path, capsys):
    pages = {"readme": tmp_path / "README.md", "page": tmp_path / "page.md"}
    for path in pages.values():
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["--results", str(gpu_results.parent)]
    for name, path in pages.items():
        arguments += [f"--{name}", str(path)]
    assert report.main(arguments) == 0
    texts = {name: path.read_text() for name, path in pages.items()}
    for text in texts.values():
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    text = texts["page"]
    assert "| tiny fp32 random | 24 x 16 x 300 | frozen | spo (direction, 2 units) |" in text
    assert "| linear_preference_loss, time against quack | 1.05x |  | unmeasured |" in text
    assert "host syncs" in text and "`python -m benchmarks.gpu --tiny`" in text
    assert "against 2 bare GEMMs" in capsys.readouterr().out
    assert (gpu_results.parent / "strategies.png").stat().st_size > 10_000
    assert "![Time and memory: gpu](results/time-memory-gpu.png)" in text
    # nothing of what the headlines name was measured
    assert texts["readme"].count("unmeasured |") == len(headlines.HEADLINES) == 10
    assert report.main([*arguments, "--no-plots"]) == 0
    assert {name: path.read_text() for name, path in pages.items()} == texts


def test_report_without_results_or_markers(gpu_results, tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "no result files" in capsys.readouterr().out
    bare = tmp_path / "README.md"
    bare.write_text("no markers")
    arguments = ["--results", str(gpu_results.parent), "--no-plots"]
    arguments += ["--readme", str(bare), "--page", str(bare)]
    assert report.main(arguments) == 2
    assert bare.read_text() == "no markers"


def test_most_rows():
    assert longest.most_rows(lambda rows: rows <= 5000, least=1, most=1 << 20, step=1) == 5000
    assert longest.most_rows(lambda rows: False) == 0
    case = dataclasses.replace(workloads.TINY, dtype="bf16")
    small, large = (longest.planned_rows(case, 10**n, "cuda:sm_90") for n in (9, 10))
    assert 0 < small < large
    assert longest.planned_rows(case, 10**3, "cuda:sm_90") == 0
    rows = gpu.longest_rows(gpu.Run("cpu", tiny=True, long=False))
    assert [row["memory_gb"] for row in rows] == [80, 24, 80, 24]
    assert all(row["planned_rows"] and row["measured_rows"] is None for row in rows)


def test_long_grid_has_every_shape_and_size():
    grid = {(w.shape, w.rows, w.trainable) for w in workloads.gpu_grid(long=True)}
    sizes = (256, 2048, 8192, 32768, 131072)
    shapes = [(s, n, t) for s in workloads.MODEL_SHAPES for n in sizes for t in (False, True)]
    assert grid == set(shapes) and len(workloads.gpu_grid(long=True)) == len(shapes)


def test_newest_rows_of_a_machine_are_merged(tmp_path):
    def document(made, commit, rows):
        rows = [{"kind": "time", "workload": w, "median_ms": ms} for w, ms in rows]
        found = {"machine": {"device": "x"}, "commit": commit, "made": made, "rows": rows}
        (tmp_path / f"{commit}.json").write_text(json.dumps(found))

    document("2026-01-01", "old", [("a", 1.0), ("b", 2.0)])
    document("2026-01-02", "new", [("a", 3.0)])
    (merged,) = report.newest_documents(tmp_path)
    found = {row["workload"]: (row["median_ms"], row["commit"]) for row in merged["rows"]}
    assert found == {"a": (3.0, "new"), "b": (2.0, "old")}
    assert tables.origin(merged) == "x, commits new, old"


def test_plot_over_n(tmp_path):
    rows = []
    for workload in workloads.cpu_sweep():
        base = {**dataclasses.asdict(workload), "median_ms": float(workload.rows), "gemm_units": 2}
        base |= {"peak_bytes": workload.rows << 20, "workspace_bytes": workload.rows << 19}
        rows += [{**base, "provider": name} for name in ("eager", "spo", "gemm")]
    document = {"machine": {"device": "x"}, "commit": "y"}
    path = plots.draw_over_n(rows, document, tmp_path / "n.png")
    assert path.stat().st_size > 10_000


def test_host_syncs():
    """What the profiler waits for as it ends, and its copy of the span on the GPU, do not count."""

    def event(name, start, end, device_type):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=device_type)

    host, device = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [
        event("measured pass", 10.0, 90.0, host),
        event("measured pass", 15.0, 99.0, device),
        event("_linear_logprob_fwd_kernel", 15.0, 30.0, device),
        event("Memcpy DtoH", 31.0, 32.0, device),
        event("aten::item", 28.0, 34.0, host),
        event("cudaStreamSynchronize", 30.0, 33.0, host),
        event("cudaDeviceSynchronize", 95.0, 99.0, host),
    ]
    assert gpu._host_syncs(events, gpu._GPU_SYNC_NAMES) == 1
    assert gpu._host_syncs(events, gpu._CPU_SYNC_NAMES) == 1
    assert sum(map(gpu._is_kernel, events)) == 1


def test_a_peer_that_fails(monkeypatch):
    """It is left out with its reason; a failure of ours is one of the stage."""

    def fails(tensors):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(providers._LOG_PROBS, "trl", fails)
    rows, skipped = accuracy.measure(["trl", "eager"], workloads.TINY, "cpu", seeds=2)
    assert [row["provider"] for row in rows] == ["eager"]
    assert skipped == {"trl": "RuntimeError: no such kernel"}
    monkeypatch.setitem(providers._LOG_PROBS, "spo:recompute", fails)
    with pytest.raises(RuntimeError, match="no such kernel"):
        accuracy.measure(["spo:recompute"], workloads.TINY, "cpu", seeds=1)
