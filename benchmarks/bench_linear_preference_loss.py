"""``linear_preference_loss`` beside Liger's fused DPO, quack, eager logits, and its own strategies.

Reference-free, so that nobody's time holds the pass of a second model. Everybody gets the same
tensors and returns the loss with the gradients of hidden states and head. quack's loss is another
one, the mean cross entropy, of the same three products.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import memory, providers, timing, workloads
from benchmarks.results import Row
from benchmarks.workloads import Workload
from spo_kernels import linear_preference_loss

PROVIDERS = ("eager", "liger", "quack", "spo:recompute", "spo:pairwise", "spo")
_BETA = 0.1
# from here on one pair of long responses, below four pairs
_LONG_ROWS = 32768

Step = Callable[[], tuple[torch.Tensor, ...]]


def test_linear_preference_loss(benchmark, record, setting) -> None:
    workload = workloads.TINY if setting.tiny else workloads.BAR
    if setting.device.startswith("cuda"):
        workload = dataclasses.replace(workloads.gpu_grid(long=False)[0], rows=8192)
    workload = dataclasses.replace(workload, trainable=True)
    steps = gated_steps(workload, setting.device)
    times = {name: [] for name in steps}

    def one_round() -> None:
        for name, step in steps.items():
            times[name].append(timing.time_once(step, setting.device))

    benchmark.group = f"linear_preference_loss {workload.name}"
    benchmark.pedantic(one_round, rounds=setting.rounds, warmup_rounds=1)
    measure = functools.partial(peak_bytes, workload=workload, setting=setting)
    times = {name: values[1:] for name, values in times.items()}
    for row in rows_of(workload, times, measure, setting.device):
        record(**row)


def step_of(provider: str, workload: Workload, device: str) -> Step:
    """Return a function that runs one forward + backward."""
    tensors = workloads.make_tensors(workload, device)
    shape = (2 * pairs_of(workload), -1)
    hidden = tensors.hidden.detach().view(*shape, workload.hidden).requires_grad_()
    weight, labels = tensors.weight, tensors.labels.view(shape)
    loss_of = {"eager": _eager, "liger": _liger, "quack": _quack}.get(provider, _ours)
    if loss_of is _ours:
        loss_of = functools.partial(_ours, strategy=provider.partition(":")[2] or "auto")

    def step() -> tuple[torch.Tensor, ...]:
        loss = loss_of(hidden, weight, labels)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return step


def pairs_of(workload: Workload) -> int:
    """Return how many pairs the rows of a workload make."""
    return 1 if workload.rows >= _LONG_ROWS else 4


def why_not(provider: str, device: str) -> str | None:
    """Return why a provider cannot run on this device, or None."""
    if provider == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if provider != "quack":
        return None
    if importlib.util.find_spec("quack") is None:
        return "quack-kernels is not installed"
    if not device.startswith("cuda") or torch.cuda.get_device_capability()[0] < 9:
        return "quack's kernels need compute capability 9.0"
    return None


def gated_steps(workload: Workload, device: str) -> dict[str, Step]:
    """Return the steps to race; each agrees with eager first, quack with eager's cross entropy."""
    toy = dataclasses.replace(workload, rows=24, hidden=16, vocab=300, dtype="fp32")
    wanted = step_of("eager", toy, device)()
    steps = {}
    for provider in PROVIDERS:
        reason = why_not(provider, device)
        if reason:
            print(f"  {workload.name}: {provider} left out: {reason}", flush=True)
            continue
        try:
            if provider == "quack":
                _gate_quack(dataclasses.replace(workload, rows=256), device)
            else:
                for found, value in zip(step_of(provider, toy, device)(), wanted, strict=True):
                    torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5)
        # a peer that breaks must not cost the others their rows
        except Exception as error:
            reason = providers.failure_of(provider, error)
            print(f"  {workload.name}: {provider} left out: {reason}", flush=True)
            continue
        steps[provider] = step_of(provider, workload, device)
    return steps


def peak_bytes(provider: str, *, workload: Workload, setting) -> int:
    """Return the peak of one step beyond its inputs, gradients included; 0 for a toy."""
    if setting.tiny:
        return 0
    if setting.device.startswith("cuda"):
        return memory.cuda_peak_bytes(step_of(provider, workload, setting.device))
    return memory.process_peak_bytes(__name__, provider, workload, threads=setting.threads)


def rows_of(
    workload: Workload, times: dict[str, list[float]], measure: Callable[[str], int], device: str
) -> list[Row]:
    """Return a row a provider with its time and peak, ours with the ratios to Liger's."""
    P = pairs_of(workload)
    rows = []
    for provider, values in times.items():
        row = {
            "kind": "linear_pairs",
            "workload": f"linear-pairs-{workload.name}",
            "device": device.partition(":")[0],
            **dataclasses.asdict(workload),
        }
        row |= {"provider": provider, "pairs": P, "pass": "forward_backward"}
        row |= timing.summary(values)
        row["peak_bytes"] = measure(provider)
        row["workspace_bytes"] = max(0, row["peak_bytes"] - workload.gradient_bytes)
        rows.append(row)
    liger = next((row for row in rows if row["provider"] == "liger"), None)
    for row in rows:
        if row["provider"].startswith("spo") and liger is not None and liger["peak_bytes"]:
            time, peak = (row[key] / liger[key] for key in ("median_ms", "peak_bytes"))
            row["note"] = f"{time:.3f}x Liger's time, {peak:.3f}x its memory"
    return rows


def _eager(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_probs = (hidden @ weight.T).log_softmax(-1)
    chosen, rejected = log_probs.gather(-1, labels[..., None])[..., 0].sum(-1).chunk(2)
    return -F.logsigmoid(_BETA * (chosen - rejected)).mean()


def _liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    # on a CPU compiling needs a C++ toolchain
    compiled = hidden.device.type == "cuda"
    loss = LigerFusedLinearDPOLoss(beta=_BETA, use_ref_model=False, compiled=compiled)
    return loss(weight, hidden, labels)[0]


def _quack(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten())


def _gate_quack(workload: Workload, device: str) -> None:
    tensors = workloads.make_tensors(workload, device)
    logits = (tensors.hidden.detach() @ tensors.weight.detach().T).float()
    wanted = F.cross_entropy(logits, tensors.labels)
    found = step_of("quack", workload, device)()[0].float()
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def _ours(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, strategy: str
) -> torch.Tensor:
    return linear_preference_loss(hidden, weight, labels, beta=_BETA, strategy=strategy).loss
