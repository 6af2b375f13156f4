"""Distance of each provider from the fp64 answer on the same rounded inputs.

    max_dlogp = max |logp - logp64|        rel_dx = |dx - dx64| / |dx64|   (Frobenius)

The upstream gradient is DPO's, from the oracle: beta 0.1, pairs of 64-token responses, a reference
one nat away per sequence.
"""

import dataclasses
import math
from collections.abc import Iterable

import torch

from benchmarks import providers
from benchmarks.results import Row
from benchmarks.workloads import Tensors, Workload, make_tensors
from spo_kernels.reference.linear_logprob import linear_logprob_reference

_BETA = 0.1
_RESPONSE_TOKENS = 64
# one definition of "close enough to be timed" for all: relative to what half precision logits cost
_GATE_REL = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
_GATE_DLOGP = {"fp32": 1e-3, "bf16": 5e-1, "fp16": 1e-1}


@dataclasses.dataclass(frozen=True)
class Answer:
    """Log-probs and gradients, all fp64."""

    logps: torch.Tensor  # [N]
    grad_hidden: torch.Tensor  # [N, H]
    grad_weight: torch.Tensor | None  # [V, H]


def oracle(tensors: Tensors, *, dpo_seed: int | None = None) -> tuple[Tensors, Answer]:
    """Return the fp64 answer for the rounded inputs, and the tensors it is the answer to.

    With ``dpo_seed`` the upstream gradient is replaced by the one a DPO loss sends. Builds the full
    fp64 logits.
    """
    hidden = tensors.hidden.detach().double().requires_grad_()
    weight = tensors.weight.detach().double().requires_grad_(tensors.weight.requires_grad)
    logps = linear_logprob_reference(hidden, weight, tensors.labels)["logps"]
    if dpo_seed is not None:
        upstream = _dpo_upstream(logps.detach(), seed=dpo_seed)
        tensors = dataclasses.replace(tensors, upstream=upstream)
    leaves = [hidden, weight] if weight.requires_grad else [hidden]
    grads = torch.autograd.grad(logps, leaves, tensors.upstream.double())
    return tensors, Answer(logps.detach(), grads[0], grads[1] if len(grads) > 1 else None)


def distances(provider: str, tensors: Tensors, truth: Answer) -> dict[str, float | None]:
    """Return max_dlogp, mean_dlogp, rel_dh and rel_dw of a provider."""
    log_probs = providers.log_probs_of(provider)
    logps, *grads = providers.forward_backward(log_probs, tensors)
    error = logps.double() - truth.logps
    return {
        "max_dlogp": error.abs().max().item(),
        "mean_dlogp": error.mean().item(),
        "rel_dh": _relative(grads[0], truth.grad_hidden),
        "rel_dw": None if truth.grad_weight is None else _relative(grads[1], truth.grad_weight),
    }


def measure(
    names: Iterable[str], workload: Workload, device: str, *, seeds: int = 3
) -> tuple[list[Row], dict[str, str]]:
    """Return one row per provider, the worst of the seeds, and why the others did not run."""
    worst: dict[str, dict[str, float | None]] = {}
    skipped = {}
    runnable = []
    for name in names:
        reason = providers.why_not(name, workload, device)
        if reason is None:
            runnable.append(name)
        else:
            skipped[name] = reason
    for seed in range(seeds):
        tensors, truth = oracle(make_tensors(workload, device, seed=seed), dpo_seed=seed)
        for name in tuple(runnable):
            try:
                found = distances(name, tensors, truth)
            # a peer that fails must not take the others' rows with it
            except Exception as error:
                skipped[name] = providers.failure_of(name, error)
                runnable.remove(name)
                worst.pop(name, None)
                continue
            held = worst.setdefault(name, found)
            for key, value in found.items():
                if value is not None and not abs(value) <= abs(held[key]):
                    held[key] = value
    rows = [
        {
            "kind": "accuracy",
            "workload": workload.name,
            **dataclasses.asdict(workload),
            "provider": name,
            "seeds": seeds,
            **{key: _rounded(value) for key, value in values.items()},
        }
        for name, values in worst.items()
    ]
    return rows, skipped


def gate(provider: str, workload: Workload, device: str) -> None:
    """Refuse to time a provider that is wrong: compare a small slice of the shape with fp64."""
    rows, vocab = min(workload.rows, 64), min(workload.vocab, 4096)
    small = dataclasses.replace(workload, rows=rows, vocab=vocab)
    tensors = make_tensors(small, device, seed=1)
    found = distances(provider, *oracle(tensors))
    limits = {"max_dlogp": _GATE_DLOGP[workload.dtype]}
    limits["rel_dh"] = limits["rel_dw"] = _GATE_REL[workload.dtype]
    for name, limit in limits.items():
        value = found[name]
        # a NaN is not below any limit
        if value is not None and not value <= limit:
            raise AssertionError(
                f"{provider} on {small.name}: {name} is {value:.2e}, allowed {limit:.0e}"
            )


def _dpo_upstream(logps: torch.Tensor, *, seed: int) -> torch.Tensor:
    rows = logps.numel()
    sequences = max(2, 2 * (rows // (2 * _RESPONSE_TOKENS)))
    sequence_of = torch.arange(rows, device=logps.device) * sequences // rows
    generator = torch.Generator().manual_seed(seed)
    # log-ratio of policy and reference: the reference is about a nat away
    ratio = torch.randn(sequences, generator=generator, dtype=torch.float64).to(logps)
    pairs = sequences // 2
    slope = _BETA * torch.sigmoid(-_BETA * (ratio[:pairs] - ratio[pairs:])) / pairs
    return torch.cat((-slope, slope))[sequence_of].float()


def _relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def _rounded(value: float | None) -> float | None:
    return value if value is None or not math.isfinite(value) else float(f"{value:.3e}")
