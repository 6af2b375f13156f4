"""``plan_linear_logprob``: budgets are obeyed, estimates monotone, errors name the way out."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_kernels import plan_linear_logprob

DEVICES = ("cpu", "cuda:sm_80", "cuda:sm_90", "cuda:sm_100")
NEEDS = [
    needs
    for size in range(4)
    for needs in itertools.combinations(("hidden", "weight", "bias"), size)
]
sizes = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 1 << 17),
        "hidden_size": st.integers(1, 8192),
        "vocab_size": st.integers(1, 300_000),
        "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        "needs_grad": st.sampled_from(NEEDS),
        "device": st.sampled_from(DEVICES),
    }
)


@settings(max_examples=150)
@given(sizes=sizes, budget=st.integers(1, 1 << 34))
def test_budget(sizes, budget):
    """A plan fits its budget, or the error names the smallest budget that works, and it works."""
    try:
        plan = plan_linear_logprob(**sizes, budget_bytes=budget)
    except ValueError as error:
        text = str(error)
        assert text.startswith("plan_linear_logprob: budget_bytes must be at least ")
        least = int(text.split("at least ")[1].split()[0])
        assert least > budget
        plan = plan_linear_logprob(**sizes, budget_bytes=least)
        budget = least
    assert plan.peak_bytes <= budget
    assert plan.strategy == "score" or sizes["needs_grad"]
    assert plan.row_chunk >= 1 and plan.vocab_chunk >= 1
    explained = plan.explain()
    assert plan.strategy in explained and "*" in explained


@settings(max_examples=80)
@given(sizes=sizes, axis=st.sampled_from(["rows", "hidden_size", "vocab_size"]))
def test_monotone(sizes, axis):
    """A larger problem needs no less time on a fixed strategy, and no less least workspace."""
    for strategy in ("score",) if not sizes["needs_grad"] else ("recompute",):
        larger = {**sizes, axis: sizes[axis] * 2 + 1}
        small, large = (
            plan_linear_logprob(**s, strategy=strategy, budget_bytes=1 << 50)
            for s in (sizes, larger)
        )
        assert large.time_ms >= small.time_ms
        assert large.gemm_units == small.gemm_units
        assert large.peak_bytes >= small.peak_bytes


@settings(max_examples=80)
@given(sizes=sizes)
def test_default_budget(sizes):
    """The default budget always has a plan."""
    plan = plan_linear_logprob(**sizes)
    assert plan.peak_bytes <= plan.budget_bytes


@pytest.mark.parametrize(
    ("device", "needs", "budget_bytes"),
    [
        # 64 MiB, of each row 2 + 4 bytes times 64 + 256 columns, a head of fp32
        ("cpu", ("hidden",), (64 << 20) + 1_920_000),
        ("cpu", ("hidden", "weight"), (64 << 20) + 1_920_000 + 128_000),
        ("cuda:sm_90", ("hidden", "weight"), (256 << 20) + 1_920_000 + 128_000),
    ],
)
def test_default_budget_by_hand(device, needs, budget_bytes):
    plan = plan_linear_logprob(
        rows=1000,
        hidden_size=64,
        vocab_size=500,
        dtype=torch.bfloat16,
        needs_grad=needs,
        device=device,
    )
    assert plan.budget_bytes == budget_bytes


def test_choices():
    """Which strategy one gets: frozen heads direction, short batches resident, long recompute."""
    shape = {"hidden_size": 4096, "vocab_size": 151936, "dtype": torch.bfloat16}
    assert plan_linear_logprob(rows=8192, **shape, needs_grad=()).strategy == "score"
    assert plan_linear_logprob(rows=8192, **shape, needs_grad=()).gemm_units == 1
    frozen = plan_linear_logprob(rows=8192, **shape, needs_grad=("hidden",))
    assert (frozen.strategy, frozen.gemm_units) == ("direction", 2)
    short = plan_linear_logprob(rows=256, **shape)
    assert (short.strategy, short.gemm_units) == ("resident", 3)
    long = plan_linear_logprob(rows=131072, **shape)
    assert (long.strategy, long.gemm_units) == ("recompute", 4)
    only_weight = plan_linear_logprob(rows=131072, **shape, needs_grad=("weight",))
    assert only_weight.gemm_units == 3
    only_bias = plan_linear_logprob(rows=131072, **shape, needs_grad=("bias",), bias=True)
    assert only_bias.gemm_units == 2
    lora = plan_linear_logprob(rows=131072, **shape, needs_grad=("hidden", "lora_b"), lora_rank=8)
    assert (lora.strategy, lora.gemm_units) == ("recompute", 3)
    lora_a = plan_linear_logprob(rows=8192, **shape, needs_grad=("hidden", "lora_a"), lora_rank=8)
    assert lora_a.strategy == "direction"
    entropy = plan_linear_logprob(rows=8192, **shape, needs_grad=("hidden",), entropy_grad=True)
    assert entropy.strategy in ("resident", "recompute")
    # asking for the entropy without its gradient changes nothing
    asked = plan_linear_logprob(
        rows=8192, **shape, needs_grad=("hidden",), outputs=("logps", "entropy")
    )
    assert asked.strategy == frozen.strategy


def test_pure():
    """The same question has the same answer, and a plan cannot be edited."""
    question = {"rows": 5000, "hidden_size": 896, "vocab_size": 151936, "dtype": torch.float16}
    plan = plan_linear_logprob(**question)
    assert plan == plan_linear_logprob(**question)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.row_chunk = 1


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"rows": -1}, ValueError, "rows must be an int >= 0, got -1"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be an int >= 1, got 0"),
        ({"budget_bytes": 0}, ValueError, "budget_bytes must be an int > 0, got 0"),
        ({"device": "tpu"}, ValueError, "device must be 'cpu' or 'cuda:sm_<arch>', got 'tpu'"),
        ({"strategy": "fast"}, ValueError, "strategy must be one of 'auto', 'direction'"),
        ({"needs_grad": ("x",)}, ValueError, "needs_grad must be one of 'bias', 'hidden'"),
        ({"outputs": ("x",)}, ValueError, "outputs must be one of 'entropy', 'is_top1'"),
        ({"budget_bytes": 1000}, ValueError, "budget_bytes must be at least [0-9]+ .strategy"),
        (
            {"strategy": "direction"},
            NotImplementedError,
            "strategy='direction' cannot give the gradients asked for .hidden, weight.",
        ),
    ],
)
def test_errors(changes, error, text):
    question = {"rows": 512, "hidden_size": 64, "vocab_size": 1000, "dtype": torch.float32}
    with pytest.raises(error, match=f"plan_linear_logprob: {text}"):
        plan_linear_logprob(**{**question, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")], ids=str)
@pytest.mark.parametrize("rows", [256, 3000, 20000])
def test_measured_peak(cuda_device, rows, needs):
    """The CUDA allocator's peak never exceeds the prediction."""
    from spo_kernels import linear_logprob

    hidden = torch.randn(rows, 1024, device=cuda_device, dtype=torch.bfloat16)
    weight = torch.randn(100_000, 1024, device=cuda_device, dtype=torch.bfloat16) / 32
    hidden.requires_grad_("hidden" in needs)
    weight.requires_grad_("weight" in needs)
    labels = torch.randint(0, 100_000, (rows,), device=cuda_device)
    major, minor = torch.cuda.get_device_capability(cuda_device)
    plan = plan_linear_logprob(
        rows=rows,
        hidden_size=1024,
        vocab_size=100_000,
        dtype=torch.bfloat16,
        needs_grad=needs,
        gathered=False,
        device=f"cuda:sm_{major}{minor}",
    )
    for _ in range(2):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = linear_logprob(hidden, weight, labels)
        if needs:
            out.logps.sum().backward()
        torch.cuda.synchronize()
    returned = sum(t.numel() * t.element_size() for t in (hidden, weight) if t.requires_grad)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= plan.peak_bytes + returned + (1 << 20)


@pytest.mark.parametrize("rows", [16, 256, 5000])
def test_gradient_of_a_bias_is_counted(rows):
    """Its products are fp32, one number a column of the chunk, whatever makes the weight's."""
    question = {
        "rows": rows,
        "hidden_size": 64,
        "vocab_size": 128256,
        "dtype": torch.bfloat16,
        "gathered": False,
        "strategy": "recompute",
        "device": "cuda:sm_90",
    }
    without = plan_linear_logprob(needs_grad=("weight",), **question)
    plan = plan_linear_logprob(needs_grad=("weight", "bias"), **question)
    scratch = rows * plan.vocab_chunk * 2
    assert plan.peak_bytes >= scratch + 4 * min(plan.vocab_chunk, 128256)
    assert plan.peak_bytes >= without.peak_bytes or plan.vocab_chunk < without.vocab_chunk
