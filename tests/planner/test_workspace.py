"""The budget is obeyed: every tensor of a call is counted while it lives, the plan covers it."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.memory import LiveBytes, workspace_bytes
from spo_kernels import (
    linear_logprob,
    linear_preference_loss,
    plan_linear_logprob,
)
from spo_kernels.ops import linear_logprob_call
from spo_kernels.ops import linear_preference_loss as linear_preference_loss_op
from spo_kernels.planner import linear_preference_loss as pair_planner
from spo_kernels.planner.linear_logprob import plan_sizes
from spo_kernels.planner.linear_preference_loss import plan_pairs

CASES = [
    ("score", (), {}),
    ("direction", ("hidden",), {}),
    ("direction", ("hidden",), {"softcap": 5.0}),
    ("resident", ("hidden", "weight"), {}),
    ("recompute", ("hidden", "weight"), {}),
    ("recompute", ("weight",), {"softcap": 5.0}),
]


@pytest.mark.parametrize("ignored", [False, True], ids=["all_rows", "gathered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("strategy", "needs", "options"), CASES)
def test_peak(strategy, needs, options, dtype, ignored, monkeypatch):
    """What lives at once stays under the plan's peak beside outputs and returned gradients.

    The torch backend; the CUDA allocator measures triton's in test_linear_logprob_plan.py (its
    interpreter copies every argument of a launch, which would be counted here).
    """
    rows, H, V = 600, 128, 10_000
    plans = []

    def recorded(*sizes, **wishes):
        plans.append(plan_sizes(*sizes, **wishes))
        return plans[-1]

    monkeypatch.setattr(linear_logprob_call, "plan_sizes", recorded)
    hidden = torch.randn(rows, H).to(dtype).requires_grad_("hidden" in needs)
    weight = (torch.randn(V, H) / 8).to(dtype).requires_grad_("weight" in needs)
    labels = torch.randint(0, V, (rows,))
    if ignored:
        labels[::50] = -100

    def run(budget):
        hidden.grad = weight.grad = None
        with LiveBytes() as live:
            out = linear_logprob(
                hidden,
                weight,
                labels,
                strategy=strategy,
                backend="torch",
                budget_bytes=budget,
                **options,
            )
            if needs:
                out.logps.sum().backward()
        return live.peak()

    returned = sum(t.numel() * t.element_size() for t in (hidden, weight) if t.requires_grad)
    outputs = 64 * rows
    run(None)
    least = plans[-1].peak_bytes
    for budget in (None, least // 2, least // 4):
        try:
            peak = run(budget)
        except ValueError as error:
            assert "budget_bytes must be at least" in str(error)
            continue
        plan = plans[-1]
        assert plan.peak_bytes <= plan.budget_bytes
        assert peak <= plan.peak_bytes + returned + outputs, (peak, plan.peak_bytes, returned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["direction", "resident", "recompute"])
def test_prediction_is_close(strategy, dtype):
    """Within 20% of what lives, above it, at a shape whose tiles are most of it."""
    rows, H, V = 1024, 256, 3 * 4096
    needs = ("hidden",) if strategy == "direction" else ("hidden", "weight")
    hidden = torch.randn(rows, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).to(dtype).requires_grad_("weight" in needs)
    labels = torch.randint(0, V, (rows,))
    leaves = [t for t in (hidden, weight) if t.requires_grad]

    def run():
        logps = linear_logprob(hidden, weight, labels, strategy=strategy, backend="torch").logps
        return logps, torch.autograd.grad(logps.sum(), leaves)

    plan = plan_linear_logprob(
        rows=rows,
        hidden_size=H,
        vocab_size=V,
        dtype=dtype,
        needs_grad=needs,
        gathered=False,
        strategy=strategy,
        device="cpu",
    )
    live = workspace_bytes(run)
    assert live <= plan.peak_bytes <= 1.2 * live, (live, plan.peak_bytes)


@settings(max_examples=80)
@given(
    rows=st.integers(1, 700),
    hidden_size=st.integers(1, 200),
    vocab_size=st.integers(2, 9000),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "autocast"]),
    needs=st.sets(st.sampled_from(["hidden", "weight", "bias", "lora_a", "lora_b"])),
    outputs=st.sampled_from([("logps",), ("logps", "entropy"), ("mean_logits", "is_top1")]),
    softcap=st.sampled_from([None, 20.0]),
    ignored=st.booleans(),
    strategy=st.sampled_from(["auto", "score", "direction", "resident", "recompute"]),
    share=st.sampled_from([1.0, 0.6]),
)
def test_peak_of_any_call(
    rows, hidden_size, vocab_size, dtype, needs, outputs, softcap, ignored, strategy, share
):
    """The plan is never below what lives beside what is returned."""
    H, V, R = hidden_size, vocab_size, 3
    autocast = dtype == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, dtype)
    shapes = {"hidden": (rows, H), "weight": (V, H), "bias": (V,)}
    shapes |= {"lora_a": (rows, R), "lora_b": (V, R)}
    tensors = {
        name: torch.randn(shape).to(dtype).requires_grad_(name in needs)
        for name, shape in shapes.items()
        if name in ("hidden", "weight") or needs & {"bias", "lora_a", "lora_b"}
    }
    has_lora = "lora_b" in tensors
    labels = torch.randint(0, V, (rows,))
    if ignored:
        labels[::7] = -100
    scored = int((labels != -100).sum())
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    question = {
        "rows": scored,
        "hidden_size": H,
        "vocab_size": V,
        "dtype": torch.bfloat16 if autocast else dtype,
        "hidden_dtype": dtype,
        "weight_dtype": dtype,
        "needs_grad": needs,
        "outputs": outputs,
        "bias": has_lora,
        "lora_rank": R * has_lora,
        "softcap": softcap,
        "gathered": scored < rows,
        "strategy": strategy,
        "device": "cpu",
    }
    try:
        plan = plan_linear_logprob(**question)
        plan = plan_linear_logprob(**question, budget_bytes=max(1, int(plan.peak_bytes * share)))
    except (NotImplementedError, ValueError):
        assume(False)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = linear_logprob(
                tensors["hidden"],
                tensors["weight"],
                labels,
                bias=tensors.get("bias"),
                lora=(tensors["lora_a"], tensors["lora_b"]) if has_lora else None,
                outputs=outputs,
                softcap=softcap,
                strategy=strategy,
                budget_bytes=plan.budget_bytes,
                backend="torch",
            )
        found = [value for value in found if value is not None]
        total = sum(value.sum() for value in found if value.dtype != torch.bool)
        return found, torch.autograd.grad(total, leaves) if leaves else ()

    live = workspace_bytes(run)
    assert live <= plan.peak_bytes, (live, plan)


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("hidden", "weight")], ids=str)
def test_peak_under_autocast(needs):
    """Slices of an fp32 head go through the compute dtype, which the plan counts."""
    rows, H, V = 600, 256, 5000
    hidden = torch.randn(rows, H, requires_grad="hidden" in needs)
    weight = (torch.randn(V, H) / 8).requires_grad_("weight" in needs)
    labels = torch.randint(0, V, (rows,))
    returned = sum(4 * t.numel() for t in (hidden, weight) if t.requires_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError) as error:
            linear_logprob(hidden, weight, labels, backend="torch", budget_bytes=1)
        least = int(str(error.value).split("must be at least ")[1].split()[0])
        with LiveBytes() as live:
            linear_logprob(
                hidden, weight, labels, backend="torch", budget_bytes=least
            ).logps.sum().backward()
    assert live.peak() <= least + returned + 64 * rows, (live.peak(), least)


@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["pairwise", "recompute"])
def test_peak_of_pairs(strategy, dtype, loss_type, monkeypatch):
    """The same of ``linear_preference_loss``: one group, several groups, and a streamed pair."""
    P, T, H, V = 3, 200, 128, 10_000
    plans = []

    def recorded(*sizes, **wishes):
        plans.append(plan_pairs(*sizes, **wishes))
        return plans[-1]

    monkeypatch.setattr(linear_preference_loss_op, "plan_pairs", recorded)
    hidden = torch.randn(2 * P, T, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) / 8).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (2 * P, T))
    labels[::2, :20] = -100

    def run(budget):
        hidden.grad = weight.grad = None
        with LiveBytes() as live:
            out = linear_preference_loss(
                hidden,
                weight,
                labels,
                loss_type=loss_type,
                strategy=strategy,
                backend="torch",
                budget_bytes=budget,
            )
            out.loss.backward()
        return live.peak()

    returned = sum(t.numel() * t.element_size() for t in (hidden, weight))
    run(None)
    # the first budgets that lead to other groups
    peaks = {c.group_rows: c.peak_bytes for c in plans[-1].candidates}
    for budget in (None, *peaks.values(), min(peaks.values()) - 1000):
        try:
            peak = run(budget)
        except ValueError as error:
            assert "budget_bytes must be at least" in str(error)
            continue
        plan = plans[-1]
        assert plan.strategy == strategy
        assert plan.peak_bytes <= plan.budget_bytes
        assert peak <= plan.peak_bytes + returned, (peak, plan.peak_bytes, returned)
    if strategy == "pairwise":
        # every pair streamed
        monkeypatch.setattr(pair_planner, "_group_sizes", lambda *_: [96])
        peak = run(None)
        assert plans[-1].group_rows == 96
        assert peak <= plans[-1].peak_bytes + returned, (peak, plans[-1].peak_bytes, returned)
