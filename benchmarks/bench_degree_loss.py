"""``degree_loss`` beside the naive formula, ``linear_logprob`` of the same batch, and a copy."""

import torch

from benchmarks import timing, workloads
from benchmarks.providers import forward_backward, log_probs_of
from spo_kernels import degree_loss
from spo_kernels.reference.degree_loss import degree_loss_reference

_DEGREES = 4
_SEGMENTS = 16


def test_degree_loss(benchmark, record, setting) -> None:
    workload = workloads.TINY if setting.tiny else workloads.BAR
    if setting.device.startswith("cuda"):
        workload = workloads.gpu_grid(long=False)[0]
    runs = make_runs(workload, setting.device)
    times = {name: [] for name in runs}

    def one_round() -> None:
        for name, run in runs.items():
            times[name].append(timing.time_once(run, setting.device))

    benchmark.group = f"degree_loss {workload.name}"
    benchmark.pedantic(one_round, rounds=setting.rounds, warmup_rounds=1)
    times = {name: values[1:] for name, values in times.items()}
    for row in rows_of(workload, times, setting.device):
        record(**row)


def make_runs(workload: workloads.Workload, device: str) -> dict:
    """Return the callables to race, after the gate against fp64."""
    tensors = workloads.make_tensors(workload, device)
    hidden = tensors.hidden
    levels, offsets, head = _degree_inputs(hidden)
    head.requires_grad_()

    truth = degree_loss_reference(
        hidden.detach().double(), levels, offsets, head.detach().double()
    )["losses"]
    found = degree_loss(hidden, levels, offsets, head).losses
    torch.testing.assert_close(found.double(), truth, atol=1e-4, rtol=1e-4)

    def step(function):
        def run():
            out = function(hidden, levels, offsets, head)
            losses = out["losses"] if isinstance(out, dict) else out.losses
            return torch.autograd.grad(losses.sum(), (hidden, head))

        return run

    log_probs = log_probs_of("spo")
    return {
        "naive": step(degree_loss_reference),
        "spo": step(degree_loss),
        "linear_logprob": lambda: forward_backward(log_probs, tensors),
    }


def _degree_inputs(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return levels, segment offsets and a head for these hidden states."""
    N, H = hidden.shape
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, _DEGREES, (N,), generator=generator, dtype=torch.int8)
    # every third token or so is key content
    levels[torch.rand(N, generator=generator) > 0.35] = 0
    offsets = torch.linspace(0, N, _SEGMENTS + 1).long()
    head = torch.randn(_DEGREES, H, generator=generator) * H**-0.5
    return levels.to(hidden.device), offsets.to(hidden.device), head.to(hidden)


def bandwidth_runs(rows: int, hidden_size: int, dtype: torch.dtype, device: str) -> dict:
    """Return a forward, which reads the hidden states once, and a copy of them."""
    hidden = torch.randn(rows, hidden_size, device=device, dtype=dtype)
    inputs = _degree_inputs(hidden)
    copy = torch.empty_like(hidden)
    return {"spo": lambda: degree_loss(hidden, *inputs), "copy": lambda: copy.copy_(hidden)}


def bandwidth_row(rows: int, hidden_size: int, times: dict[str, list[float]], device: str) -> dict:
    """Return the forward's share of the bandwidth of a copy, which moves twice its bytes."""
    numbers = {name: timing.summary(values) for name, values in times.items()}
    share = numbers["copy"]["median_ms"] / (2 * numbers["spo"]["median_ms"])
    return {
        "kind": "degree",
        "workload": f"degree-sums-n{rows}-h{hidden_size}",
        "provider": "spo",
        "device": device.partition(":")[0],
        **numbers["spo"],
        "copy_share": round(share, 4),
        "note": f"{share:.2f} of a copy's bandwidth",
    }


def rows_of(workload: workloads.Workload, times: dict[str, list[float]], device: str) -> list[dict]:
    """Return a row for the naive form and ours; ours with its share of the batch's log-probs."""
    numbers = {name: timing.summary(values) for name, values in times.items()}
    beside = 1 + numbers["spo"]["median_ms"] / numbers["linear_logprob"]["median_ms"]
    base = {"kind": "degree", "workload": f"degree-{workload.name}"}
    base["device"] = device.partition(":")[0]
    return [
        {**base, "provider": "naive", **numbers["naive"]},
        {
            **base,
            "provider": "spo",
            **numbers["spo"],
            "beside": round(beside, 4),
            "note": f"linear_logprob and degree_loss {beside:.3f}x linear_logprob alone",
        },
    ]
