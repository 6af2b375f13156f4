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
    plan_linear_preference_loss,
)
from tests.helpers.budgets import smallest_budget

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
def test_peak(strategy, needs, options, dtype, ignored):
    """What lives at once stays under the plan's peak beside outputs and returned gradients.

    The torch backend; the CUDA allocator measures triton's in test_linear_logprob_plan.py (its
    interpreter copies every argument of a launch, which would be counted here).
    """
    rows, H, V = 600, 128, 10_000
    hidden = torch.randn(rows, H).to(dtype).requires_grad_("hidden" in needs)
    weight = (torch.randn(V, H) / 8).to(dtype).requires_grad_("weight" in needs)
    labels = torch.randint(0, V, (rows,))
    if ignored:
        labels[::50] = -100
    scored = int((labels != -100).sum())

    def score(budget):
        return linear_logprob(
            hidden,
            weight,
            labels,
            strategy=strategy,
            backend="torch",
            budget_bytes=budget,
            **options,
        )

    returned = sum(t.numel() * t.element_size() for t in (hidden, weight) if t.requires_grad)
    outputs = 64 * rows
    question = {
        "rows": scored,
        "hidden_size": H,
        "vocab_size": V,
        "dtype": dtype,
        "needs_grad": needs,
        "gathered": scored < rows,
        "strategy": strategy,
        "device": "cpu",
        **options,
    }
    whole, least = plan_linear_logprob(**question).peak_bytes, smallest_budget(score)
    # the default, one that needs more chunks, and the smallest that is accepted
    for budget in (None, max(least, whole // 2), least):
        plan = plan_linear_logprob(**question, budget_bytes=budget)
        assert plan.peak_bytes <= plan.budget_bytes
        hidden.grad = weight.grad = None
        with LiveBytes() as live:
            out = score(budget)
            if needs:
                out.logps.sum().backward()
        assert live.peak() <= plan.peak_bytes + returned + outputs, (plan, returned)


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

        def score(budget):
            return linear_logprob(hidden, weight, labels, backend="torch", budget_bytes=budget)

        least = smallest_budget(score)
        with LiveBytes() as live:
            score(least).logps.sum().backward()
    assert live.peak() <= least + returned + 64 * rows, (live.peak(), least)


@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["pairwise", "recompute"])
@pytest.mark.parametrize(("P", "T"), [(3, 100), (1, 300)])
def test_peak_of_pairs(P, T, strategy, dtype, loss_type):
    """The same of ``linear_preference_loss``: one group, several groups, and a streamed pair."""
    H, V = 128, 10_000
    hidden = torch.randn(2 * P, T, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) / 8).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (2 * P, T))
    labels[::2, :20] = -100
    tokens = (labels != -100).sum(1).tolist()
    pair_rows = list(zip(tokens[:P], tokens[P:], strict=True))
    question = {
        "pair_rows": pair_rows,
        "hidden_size": H,
        "vocab_size": V,
        "dtype": dtype,
        "needs_grad": ("hidden", "weight"),
        "gathered": True,
        "positions": labels.numel(),
        "is_margin": loss_type == "sigmoid",
        "strategy": strategy,
        "device": "cpu",
    }

    def loss_of(budget):
        return linear_preference_loss(
            hidden,
            weight,
            labels,
            loss_type=loss_type,
            # log-probs of -1000 would make slopes that are denormal, and slow
            beta=0.01,
            strategy=strategy,
            backend="torch",
            budget_bytes=budget,
        ).loss

    returned = sum(t.numel() * t.element_size() for t in (hidden, weight))
    least = smallest_budget(loss_of)
    # a budget for every size of a group that there is
    peaks = {c.group_rows: c.peak_bytes for c in plan_linear_preference_loss(**question).candidates}
    sizes = set()
    for budget in (None, *(peak for peak in peaks.values() if peak >= least), least):
        plan = plan_linear_preference_loss(**question, budget_bytes=budget)
        assert plan.peak_bytes <= plan.budget_bytes
        sizes.add(plan.group_rows)
        hidden.grad = weight.grad = None
        with LiveBytes() as live:
            loss_of(budget).backward()
        assert live.peak() <= plan.peak_bytes + returned, (plan, returned)
    if strategy == "pairwise":
        # all pairs together, and then groups of fewer, or spans of the only pair
        total = sum(map(sum, pair_rows))
        assert max(sizes) >= total and min(sizes) <= total / 2
