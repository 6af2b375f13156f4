"""The budget is obeyed: every tensor of a call is counted while it lives, the plan covers it."""

import sys

import pytest
import torch

from benchmarks.memory import LiveBytes
from spo_kernels import (
    _linear_settings,
    linear_logprob,
    linear_preference_loss,
    pair_planner,
    plan_linear_logprob,
    plan_linear_preference_loss,
)

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

    The torch backend; the CUDA allocator measures triton's in test_planner.py (its interpreter
    copies every argument of a launch, which would be counted here).
    """
    rows, H, V = 600, 128, 10_000
    plans = []

    def recorded(**question):
        plans.append(plan_linear_logprob(**question))
        return plans[-1]

    monkeypatch.setattr(_linear_settings, "plan_linear_logprob", recorded)
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
        return live.peak

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
    assert live.peak <= least + returned + 64 * rows, (live.peak, least)


@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["pairwise", "recompute"])
def test_peak_of_pairs(strategy, dtype, loss_type, monkeypatch):
    """The same of ``linear_preference_loss``: one group, several groups, and a streamed pair."""
    P, T, H, V = 3, 200, 128, 10_000
    plans = []

    def recorded(**question):
        plans.append(plan_linear_preference_loss(**question))
        return plans[-1]

    op_module = sys.modules[linear_preference_loss.__module__]
    monkeypatch.setattr(op_module, "plan_linear_preference_loss", recorded)
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
        return live.peak

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
