"""``plan_linear_preference_loss``: groups hold every pair once, budgets are obeyed, three units."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_kernels import plan_linear_preference_loss
from spo_kernels.calls import layout
from spo_kernels.planner.linear_preference_loss import PairGroup, pair_groups

LLAMA8B = {"hidden_size": 4096, "vocab_size": 128256, "dtype": torch.bfloat16}
rows = st.integers(0, 5000)
questions = st.fixed_dictionaries(
    {
        "pair_rows": st.lists(st.tuples(rows, rows), max_size=9),
        "hidden_size": st.integers(1, 4096),
        "vocab_size": st.integers(1, 200_000),
        "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        "needs_grad": st.sampled_from([(), ("hidden",), ("weight",), ("hidden", "weight")]),
        "device": st.sampled_from(["cpu", "cuda:sm_80", "cuda:sm_90"]),
        "is_pairwise": st.booleans(),
        "is_streamable": st.booleans(),
        "is_margin": st.booleans(),
    }
)


@given(pair_rows=st.lists(st.tuples(rows, rows), max_size=20), group_rows=st.integers(1, 12_000))
def test_groups(pair_rows, group_rows):
    """Every pair once and in order; a group fits, or is one pair that does not."""
    groups = pair_groups(pair_rows, group_rows)
    assert [pair for g in groups for pair in range(g.first, g.stop)] == list(range(len(pair_rows)))
    for group in groups:
        total = sum(map(sum, pair_rows[group.first : group.stop]))
        assert group.streamed == (total > group_rows)
        assert not group.streamed or group.stop == group.first + 1


@settings(max_examples=150)
@given(question=questions, budget=st.integers(1, 1 << 34))
def test_budget(question, budget):
    """A plan fits its budget, or the error names the smallest budget that works, and it works."""
    try:
        plan = plan_linear_preference_loss(**question, budget_bytes=budget)
    except ValueError as error:
        least = int(re.search(r"must be at least (\d+) \(strategy", str(error))[1])
        assert least > budget
        plan = plan_linear_preference_loss(**question, budget_bytes=least)
        budget = least
    assert plan.peak_bytes <= budget
    assert (plan.group_rows > 0) == (plan.strategy == "pairwise")
    if plan.strategy == "pairwise":
        assert question["is_pairwise"] and "weight" in question["needs_grad"]
        fits = plan.group_rows >= max(map(sum, question["pair_rows"]))
        assert fits or question["is_streamable"]
    assert "*" in plan.explain() and "linear_preference_loss" in plan.explain()


def test_long_context():
    """One pair of 65,536 tokens each: three units inside the default budget, and what it costs."""
    question = {**LLAMA8B, "pair_rows": [(65536, 65536)]}
    plan = plan_linear_preference_loss(**question)
    assert (plan.strategy, plan.gemm_units) == ("pairwise", 3)
    assert plan.group_rows < 65536
    recompute = plan_linear_preference_loss(**question, strategy="recompute")
    assert plan.time_ms < 0.9 * recompute.time_ms
    # two sums of the head's gradient instead of one
    two_sided = plan_linear_preference_loss(
        **question, is_margin=False, strategy="pairwise", budget_bytes=1 << 34
    )
    one_sided = plan_linear_preference_loss(**question, strategy="pairwise", budget_bytes=1 << 34)
    apart = [
        min(c.peak_bytes for c in found.candidates if c.group_rows == 2048)
        for found in (two_sided, one_sided)
    ]
    head = 4 * LLAMA8B["hidden_size"] * LLAMA8B["vocab_size"]
    assert head // 2 < apart[0] - apart[1] <= head


def test_nothing_scored():
    for pair_rows in ([], [(0, 0)], [(0, 0)] * 3):
        for is_streamable in (False, True):
            plan = plan_linear_preference_loss(
                **LLAMA8B, pair_rows=pair_rows, is_streamable=is_streamable
            )
            assert plan.peak_bytes <= plan.budget_bytes


def test_small_pieces_lose():
    """Pieces of a few hundred rows pay more for the sums than a product saves."""
    question = {**LLAMA8B, "pair_rows": [(256, 256)] * 64}
    by_rows = {
        c.group_rows: c.time_ms
        for c in plan_linear_preference_loss(**question, budget_bytes=1 << 40).candidates
    }
    recompute = min(
        c.time_ms
        for c in plan_linear_preference_loss(**question, budget_bytes=1 << 40).candidates
        if c.strategy == "recompute"
    )
    assert by_rows[512] > recompute > by_rows[4096]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"pair_rows": [(1, -1)]}, ValueError, "pair_rows must be an int >= 0, got -1"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be an int >= 1, got 0"),
        ({"needs_grad": ("head",)}, ValueError, "needs_grad must be one of"),
        ({"budget_bytes": 1.5}, ValueError, "budget_bytes must be an int > 0, got 1.5"),
        ({"strategy": "score"}, NotImplementedError, "'score' cannot give the gradients"),
        (
            {"strategy": "pairwise", "needs_grad": ("hidden",)},
            NotImplementedError,
            "the head needs no gradient",
        ),
        (
            {"strategy": "pairwise", "is_pairwise": False},
            NotImplementedError,
            "its loss couples the pairs",
        ),
    ],
    ids=str,
)
def test_errors(change, error, match):
    question = {**LLAMA8B, "pair_rows": [(8, 8)], **change}
    with pytest.raises(error, match=f"plan_linear_preference_loss: .*{match}"):
        plan_linear_preference_loss(**question)


def test_group_of_one():
    assert pair_groups([(5, 6)], 11) == [PairGroup(0, 1, False)]
    assert pair_groups([(5, 6)], 10) == [PairGroup(0, 1, True)]
    assert pair_groups([], 10) == []


def test_few_rows_of_a_piece_take_no_other_engine(monkeypatch):
    """Sums over spans are fp32 whatever a call of so few rows would do by itself."""

    def plan():
        return plan_linear_preference_loss(
            pair_rows=((64, 64, 64), (64, 64, 64)),
            hidden_size=512,
            vocab_size=32000,
            dtype=torch.float16,
            strategy="pairwise",
            device="cuda:sm_90",
        )

    found = plan()
    monkeypatch.setattr(layout, "WEIGHT_KERNEL_ROWS", 0)
    assert plan() == found
