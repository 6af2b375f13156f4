"""Who computes per-token log-probs in the benchmarks: eager, torch, TRL, Liger, CCE and ours.

A provider maps ``Tensors`` to ``[N]`` log-probs that are differentiable per row. ``why_not`` says
why one cannot run a workload here; a benchmark shows that sentence instead of a number.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.workloads import DTYPES, Tensors, Workload, make_tensors
from spo_kernels import Plan, linear_logprob, plan_linear_logprob

LogProbs = Callable[[Tensors], torch.Tensor]

_OURS = "spo"
# Ampere and later have the bf16 instructions that CCE's kernels are written for
_CCE_CAPABILITY = (8, 0)


def _eager(t: Tensors) -> torch.Tensor:
    log_probs = (t.hidden @ t.weight.T).log_softmax(-1)
    return log_probs.gather(-1, t.labels[:, None])[:, 0]


@functools.cache
def _compiled() -> LogProbs:
    # the gate runs another shape first, and must not make the timed one a dynamic one
    return torch.compile(_eager, dynamic=False)


def _torch_compile(t: Tensors) -> torch.Tensor:
    return _compiled()(t)


def _torch_lce(t: Tensors) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(t.hidden, t.weight, t.labels, reduction="none", options=options)


def _trl(t: Tensors) -> torch.Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer import utils

    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    outputs = ("log_probs",)
    return ChunkedLogProbFunction.apply(
        t.hidden, t.weight, None, t.labels, 1.0, chunk, None, 1.0, outputs
    )[0]


def _liger(t: Tensors) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    out = liger_fused_linear_cross_entropy(t.hidden, t.weight, t.labels, reduction="none")
    return -(out[0] if isinstance(out, tuple) else out)


def _cce(t: Tensors) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # without its gradient filter: the others compute the exact gradient
    return -linear_cross_entropy(
        t.hidden, t.weight, t.labels, reduction="none", filter_eps=None, impl="cce"
    )


def _ours(t: Tensors, strategy: str) -> torch.Tensor:
    rows = t.labels.numel()
    return linear_logprob(t.hidden, t.weight, t.labels, scored_rows=rows, strategy=strategy).logps


_LOG_PROBS: dict[str, LogProbs] = {
    "eager": _eager,
    "torch.compile": _torch_compile,
    "torch.lce": _torch_lce,
    "trl": _trl,
    "liger": _liger,
    "cce": _cce,
    _OURS: functools.partial(_ours, strategy="auto"),
    "spo:direction": functools.partial(_ours, strategy="direction"),
    "spo:resident": functools.partial(_ours, strategy="resident"),
    "spo:recompute": functools.partial(_ours, strategy="recompute"),
}
NAMES = tuple(_LOG_PROBS)
PEERS = tuple(name for name in NAMES if not name.startswith(_OURS))


def log_probs_of(name: str) -> LogProbs:
    """Return the provider's function."""
    return _LOG_PROBS[name]


def forward(log_probs: LogProbs, tensors: Tensors) -> torch.Tensor:
    """Run the forward alone, as a reference model does."""
    with torch.no_grad():
        return log_probs(tensors)


def forward_backward(log_probs: LogProbs, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    """Run forward and backward and return the log-probs and the gradients of the leaves."""
    out = log_probs(tensors)
    grads = torch.autograd.grad(out, tensors.leaves, tensors.upstream.to(out.dtype))
    return out.detach(), *grads


def step_of(name: str, workload: Workload, device: str) -> Callable[[], Any]:
    """Return a function that runs one forward + backward of a provider."""
    log_probs, tensors = log_probs_of(name), make_tensors(workload, device)
    return lambda: forward_backward(log_probs, tensors)


def why_not(name: str, workload: Workload, device: str) -> str | None:
    """Return why the provider cannot run the workload on this device, or None."""
    on_gpu = device.startswith("cuda")
    if name.startswith("spo:"):
        try:
            plan_of(workload, device, strategy=name.removeprefix("spo:"))
        except (ValueError, NotImplementedError) as error:
            return str(error)
        return None
    package = {"trl": "trl", "liger": "liger_kernel", "cce": "cut_cross_entropy"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if name in ("liger", "cce", "torch.compile") and not on_gpu:
        return {
            "liger": "Liger's per-token kernels are Triton only and need a GPU",
            "cce": "CCE's kernels are Triton only and need a GPU",
            "torch.compile": "compiling needs a C++ toolchain on a CPU; run on a GPU only",
        }[name]
    if name == "cce":
        if torch.cuda.get_device_capability() < _CCE_CAPABILITY:
            return "CCE needs compute capability 8.0"
        if workload.dtype == "fp32":
            return "CCE takes half precision only"
    if name == "liger" and not _takes(_liger_function(), "reduction"):
        return "this Liger has no per-token reduction"
    if name == "torch.lce" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy"
    if name in ("eager", "torch.compile") and on_gpu:
        # logits, their log-softmax and both gradients
        needed = workload.rows * workload.vocab * 4 * DTYPES[workload.dtype].itemsize
        free = torch.cuda.mem_get_info()[0]
        if needed > 0.9 * free:
            return f"full logits need about {needed / 2**30:.0f} GiB"
    return None


def failure_of(name: str, error: Exception) -> str:
    """Return a peer's failure as the reason to leave it out; ours must run, and be right.

    A strategy of ours forced upon a shape may run out of memory.
    """
    is_forced = ":" in name and isinstance(error, torch.cuda.OutOfMemoryError)
    if name.startswith(_OURS) and not is_forced:
        raise error
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def plan_of(
    workload: Workload, device: str, *, strategy: str = "auto", budget_bytes: int | None = None
) -> Plan:
    """Return the plan ``linear_logprob`` makes for the forward + backward of a workload.

    ``device`` is "cpu", "cuda" for the GPU that is there, or one that the planner knows by name.
    """
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        device = f"cuda:sm_{major}{minor}"
    return plan_linear_logprob(
        rows=workload.rows,
        hidden_size=workload.hidden,
        vocab_size=workload.vocab,
        dtype=DTYPES[workload.dtype],
        needs_grad=("hidden", "weight") if workload.trainable else ("hidden",),
        gathered=False,
        strategy=strategy,
        budget_bytes=budget_bytes,
        device=device,
    )


def facts_of(name: str, workload: Workload, device: str) -> dict[str, Any]:
    """Return what is known of a run before it runs; for ours, the plan."""
    if not name.startswith(_OURS):
        return {"strategy": None, "planned_bytes": None, "planned_ms": None, "gemm_units": None}
    strategy = name.partition(":")[2] or "auto"
    plan = plan_of(workload, device, strategy=strategy)
    return {
        "strategy": plan.strategy,
        "planned_bytes": plan.peak_bytes,
        "planned_ms": round(plan.time_ms, 4),
        "gemm_units": plan.gemm_units,
    }


def _liger_function() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _takes(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters
