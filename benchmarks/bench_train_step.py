"""A DPO training step of stock TRL beside ours, with SPO's extra cost on its own line."""

import statistics

import torch

from benchmarks import timing, train_step


def test_train_step(benchmark, record, setting, tmp_path) -> None:
    shape = train_step.TINY_STEP if setting.tiny else train_step.CPU_STEP
    if setting.device.startswith("cuda"):
        shape = train_step.gpu_steps(long=False)[0]
    steps = {name: train_step.make_step(name, shape, tmp_path) for name in train_step.TRAINERS}
    losses = {name: float(step().detach()) for name, (step, _) in steps.items()}
    # the gate: with gamma=0 it is the same loss
    torch.testing.assert_close(losses["spo gamma=0"], losses["trl"], atol=1e-3, rtol=1e-3)
    times = {name: [] for name in steps}

    def one_round() -> None:
        for name, (step, _) in steps.items():
            times[name].append(timing.time_once(step, setting.device))

    benchmark.group = shape.workload
    benchmark.pedantic(one_round, rounds=setting.rounds, warmup_rounds=1)
    for row in rows_of(
        shape, {name: values[1:] for name, values in times.items()}, steps["trl"][1]
    ):
        record(**row)


def rows_of(shape: train_step.StepShape, times: dict[str, list[float]], tokens: int) -> list[dict]:
    """Return a row per trainer, and one for what SPO costs more than DPO through our log-probs."""
    rows = []
    for name, values in times.items():
        row = {"kind": "step", "workload": shape.workload, "provider": name}
        row |= timing.summary(values)
        rate = tokens / row["median_ms"] * 1e3
        rows.append({**row, "tokens": tokens, "note": f"{rate:,.0f} tokens/s"})
    extra = [ours - plain for ours, plain in zip(times["spo"], times["spo gamma=0"], strict=True)]
    share = statistics.median(extra) / rows[1]["median_ms"]
    row = {"kind": "step", "workload": shape.workload, "provider": "SPO's extra cost"}
    rows.append({**row, **timing.summary(extra), "note": f"{share:+.1%} of the step"})
    return rows
