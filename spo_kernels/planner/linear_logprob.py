"""The planner: a pure function from sizes and a byte budget to what ``linear_logprob`` runs.

Every feasible (strategy, row chunk, vocab chunk) is listed with its GEMM units (one unit is one
N x H x V product, 2NHV FLOP), the bytes it moves and its peak workspace; the one with the least
predicted time whose workspace fits the budget is returned. Workspace is what the call allocates
beyond its inputs, its per-row outputs and the gradients it returns; it includes what is kept from
forward to backward.
"""

import dataclasses
from collections.abc import Iterable

import torch

from spo_kernels.calls.checks import check_choice, fail
from spo_kernels.calls.plan import GRAD_INPUTS, OUTPUTS, STRATEGIES, Candidate, Plan, Strategy
from spo_kernels.planner.models import (
    MIN_VOCAB_STEP,
    Sizes,
    gemm_units,
    torch_candidates,
    triton_candidates,
)

_OP = "plan_linear_logprob"
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """The rates and slack that the models assume of a device."""

    flops: float
    bytes_per_second: float
    slack_bytes: int


# sm_90: what bare GEMMs and copies reach on an H200; benchmarks/README.md has the op's times beside
# these predictions, which know no cost of a launch: calls that wait for the host take longer. The
# other GPUs are estimates. cpu: ``spo-kernels tune --threads 2`` on an idle AMD EPYC, whose twelve
# points it meets within 10%
_DEVICES = {
    "sm_80": DeviceFacts(2.5e14, 1.6e12, 256 * _MIB),
    "sm_90": DeviceFacts(7.85e14, 4.3e12, 256 * _MIB),
    "sm_100": DeviceFacts(1.8e15, 6.5e12, 256 * _MIB),
    "cpu": DeviceFacts(2.44e11, 1.13e10, 64 * _MIB),
}


def plan_linear_logprob(
    *,
    rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    hidden_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    needs_grad: Iterable[str] = ("hidden", "weight"),
    outputs: Iterable[str] = ("logps",),
    entropy_grad: bool = False,
    bias: bool = False,
    lora_rank: int = 0,
    softcap: float | None = None,
    gathered: bool = True,
    head_copied: bool = False,
    group_size: int = 1,
    budget_bytes: int | None = None,
    strategy: str = "auto",
    device: str = "cuda:sm_90",
) -> Plan:
    """Choose how ``linear_logprob`` runs.

        time = units * 2 N H V / flops + bytes moved / bandwidth

    Pure: nothing is allocated and no device is touched.

    Args:
        rows: N >= 0, rows scored after ignored positions are dropped.
        hidden_size, vocab_size: H, V >= 1.
        dtype: compute dtype (bf16, fp16, fp32, fp64); under autocast, autocast's.
        hidden_dtype: dtype of the hidden states when it differs from the compute dtype.
        weight_dtype: dtype of the stored weight when it differs (autocast over an fp32 weight).
        needs_grad: subset of hidden, weight, bias, lora_a, lora_b.
        outputs: subset of logps, entropy, logsumexp, mean_logits, is_top1, log_sum_sq_probs.
        entropy_grad: whether a gradient will arrive at the entropy. Without it a surprise gradient
            costs ``direction`` an extra recompute pass.
        bias, lora_rank, softcap: terms of the logits beside hidden states and weight.
        gathered: whether ignored positions are dropped by a row gather (one more ``[rows, H]``).
        head_copied: whether the weight's last axis is strided, so that slices of it are copied.
        group_size: ranks that share the vocabulary; ``vocab_size`` is then this rank's share.
        budget_bytes: > 0; default ``default_budget_bytes``: 256 MiB (64 MiB on cpu) + (4 +
            itemsize) N (H + 256) + (4VH if weight needs a gradient).
        strategy: "auto" or one of score, direction, resident, recompute.
        device: "cuda:sm_80" / "cuda:sm_90" / "cuda:sm_100" (triton), or "cpu" (torch backend).
    Returns:
        A ``Plan``; ``explain()`` prints the candidates.
    Raises:
        ValueError: a bad size, name or strategy; a budget nothing fits (names the smallest that
            works).
        NotImplementedError: a forced strategy that cannot give a gradient asked for.
    """
    for name, size, least in (
        ("rows", rows, 0),
        ("hidden_size", hidden_size, 1),
        ("vocab_size", vocab_size, 1),
        ("lora_rank", lora_rank, 0),
        ("group_size", group_size, 1),
    ):
        check_size(_OP, name, size, least)
    needs, asked = tuple(needs_grad), tuple(outputs)
    for name in needs:
        check_choice(_OP, "needs_grad", name, GRAD_INPUTS)
    for name in asked:
        check_choice(_OP, "outputs", name, OUTPUTS)
    check_choice(_OP, "strategy", strategy, ("auto", *STRATEGIES))
    sizes = Sizes(
        N=rows,
        H=hidden_size,
        V=vocab_size,
        R=lora_rank,
        dtype=dtype,
        hidden_dtype=hidden_dtype or dtype,
        weight_dtype=weight_dtype or dtype,
        needs=frozenset(needs),
        outputs=frozenset(asked),
        capped=softcap is not None,
        gathered=gathered,
        head_strided=head_copied,
        ranks=group_size,
    )
    return plan_sizes(
        sizes,
        entropy_grad=entropy_grad,
        budget_bytes=budget_bytes,
        strategy=strategy,
        device=device,
    )


def plan_sizes(
    sizes: Sizes,
    *,
    entropy_grad: bool = False,
    budget_bytes: int | None,
    strategy: str,
    device: str,
) -> Plan:
    """Choose how a call of these sizes runs; names and sizes have been checked."""
    budget_bytes = check_budget(_OP, budget_bytes, default_budget_bytes(sizes, device))
    allowed = allowed_strategies(sizes.needs, sizes.capped, entropy_grad)
    if strategy != "auto":
        allowed = forced_strategy(_OP, strategy, allowed, sizes.needs)
    candidates = list_candidates(sizes, allowed, budget_bytes, device)
    return choose(_OP, candidates, sizes, budget_bytes, device)


def list_candidates(
    sizes: Sizes, strategies: Iterable[Strategy], budget_bytes: int, device: str
) -> list[Candidate]:
    """Return every strategy and chunk size that the budget is asked about."""
    kind, facts = device_facts(device)
    model = torch_candidates if kind == "cpu" else triton_candidates
    candidates = []
    for name in strategies:
        units = gemm_units(name, sizes.needs)
        for row_chunk, vocab_chunk, peak, moved in model(name, sizes, budget_bytes):
            time_ms = predicted_ms(facts, units, sizes, moved)
            candidates.append(Candidate(name, row_chunk, vocab_chunk, units, moved, peak, time_ms))
    return candidates


def predicted_ms(facts: DeviceFacts, units: int, sizes: Sizes, moved: int) -> float:
    """Return the time model's answer: products at full rate, then the bytes."""
    seconds = units * 2 * sizes.N * sizes.H * sizes.V / facts.flops
    return (seconds + moved / facts.bytes_per_second) * 1e3


def choose(
    op: str, candidates: list[Candidate], sizes: Sizes, budget_bytes: int, device: str
) -> Plan:
    """Return the fastest candidate that fits, or raise with the smallest budget that works."""
    fitting = [c for c in candidates if c.peak_bytes <= budget_bytes]
    if not fitting:
        smallest = min(candidates, key=lambda c: c.peak_bytes)
        fail(
            op,
            "budget_bytes",
            f"be at least {smallest.peak_bytes} (strategy {smallest.strategy!r})",
            budget_bytes,
        )
    best = min(fitting, key=lambda c: (c.time_ms, c.peak_bytes))
    return Plan(
        **vars(best),
        budget_bytes=budget_bytes,
        rows=sizes.N,
        hidden_size=sizes.H,
        vocab_size=sizes.V,
        device=device,
        candidates=tuple(candidates),
        op=op.removeprefix("plan_"),
    )


def check_size(op: str, name: str, size: int, least: int) -> None:
    """Require an int of at least ``least``."""
    if isinstance(size, bool) or not isinstance(size, int) or size < least:
        fail(op, name, f"be an int >= {least}", size)


def check_budget(op: str, budget_bytes: int | None, default: int) -> int:
    """Return the budget, ``default`` for None."""
    if budget_bytes is None:
        return default
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes <= 0:
        fail(op, "budget_bytes", "be an int > 0", budget_bytes)
    return budget_bytes


def default_budget_bytes(sizes: Sizes, device: str) -> int:
    """Return the default workspace of one call, about what TRL's own function takes.

    256 MiB (64 MiB on cpu), the gathered rows and an fp32 ``[N, H]``, 256 columns more of both for
    what else a row needs, and an fp32 ``[V, H]`` if the weight trains.
    """
    slack = device_facts(device)[1].slack_bytes
    weight_bytes = 4 * sizes.V * sizes.H if "weight" in sizes.needs else 0
    return slack + (4 + sizes.item) * sizes.N * (sizes.H + MIN_VOCAB_STEP) + weight_bytes


def device_facts(device: str) -> tuple[str, DeviceFacts]:
    """Return "cpu" or the planned architecture, and what is known of it."""
    if device == "cpu":
        return "cpu", _DEVICES["cpu"]
    arch = device.removeprefix("cuda:")
    if not device.startswith("cuda:sm_") or not arch.removeprefix("sm_").isdigit():
        fail(_OP, "device", "be 'cpu' or 'cuda:sm_<arch>'", repr(device))
    # an architecture without a row of its own is planned like the nearest older one
    number = int(arch.removeprefix("sm_"))
    key = "sm_100" if number >= 100 else "sm_90" if number >= 90 else "sm_80"
    return key, _DEVICES[key]


def allowed_strategies(
    needs: frozenset[str], softcap: bool, entropy_grad: bool
) -> tuple[Strategy, ...]:
    """Return the strategies of ``linear_logprob`` that can give these gradients."""
    if not needs:
        return ("score",)
    head_grad = needs & {"weight", "bias", "lora_b"}
    if entropy_grad:
        # the kept tile has lost the logit behind the cap, and one vector has no entropy in it
        return ("recompute",) if softcap else ("resident", "recompute")
    return ("resident", "recompute") if head_grad else ("direction", "resident", "recompute")


def forced_strategy(
    op: str, strategy: Strategy, allowed: tuple[Strategy, ...], needs: frozenset[str]
) -> tuple[Strategy]:
    """Return the one strategy asked for, refusing it where it cannot give the gradients."""
    if strategy not in allowed:
        raise NotImplementedError(
            f"{op}: strategy={strategy!r} cannot give the gradients asked for "
            f"({', '.join(sorted(needs)) or 'none'}). Use one of {', '.join(allowed)}."
        )
    return (strategy,)
