"""``linear_logprob(group=)``: ranks with a slice of the head each give the whole head's results.

Every test starts processes over gloo that run one function of this file.
"""

import dataclasses
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.memory import LiveBytes
from spo_kernels import linear_logprob
from spo_kernels.kernels.device import INTERPRET
from tests.helpers.budgets import smallest_budget
from tests.helpers.logprob_cases import (
    ALL_OUTPUTS,
    DIFFERENTIABLE,
    STRATEGIES,
    TRANSFORMS,
    Case,
    make_case,
    spread_of,
)
from tests.helpers.oracle import assert_within_budget

V = 151
# where each rank's rows of the head end: unequal, one of them a single row
ENDS = {2: (70, V), 3: (1, 97, V)}
# a LoRA is part of every case: direction without its gradient adds nothing
STRATEGIES = [case for case in STRATEGIES if case != ("direction", ("hidden",))]
HEAD = ("weight", "bias", "lora_b")


def in_group(rank: int, world: int, folder: str, scenario) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        scenario(rank, world)
        dist.barrier()
    except Exception:
        # the error of a rank that only lost its peer may be reported first
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def run(scenario, world: int, folder) -> None:
    mp.spawn(in_group, (world, str(folder), scenario), nprocs=world)


def rows_of(rank: int, world: int) -> slice:
    return slice(ENDS[world][rank - 1] if rank else 0, ENDS[world][rank])


def shard(case: Case, rows: slice) -> Case:
    """The same problem with one rank's rows of the head."""
    tensors = {
        name: tensor[rows] if name in HEAD and tensor is not None else tensor
        for name, tensor in case.tensors.items()
    }
    return dataclasses.replace(case, tensors=tensors)


def compare(case: Case, needs, rank: int, world: int, outputs=ALL_OUTPUTS, **settings) -> None:
    rows = rows_of(rank, world)
    out, grads = shard(case, rows).evaluate(
        "op", needs, outputs=outputs, group=dist.group.WORLD, **settings
    )
    eager, eager_grads = case.evaluate("eager", needs)
    oracle, oracle_grads = case.evaluate("oracle", needs)
    as_fp32 = {k: None if v is None else v.float() for k, v in case.tensors.items()}
    reference = dataclasses.replace(case, tensors=as_fp32).evaluate("eager", ())[0]
    where = f"rank {rank} {settings} {tuple(case.upstream)}"
    for key in outputs:
        if key == "is_top1":
            assert torch.equal(out[key], oracle[key]), where
        else:
            values = out[key], reference[key], oracle[key]
            assert_within_budget(f"{where} {key}", *values, spread_of(case, (), key))
            every = [torch.empty_like(out[key]) for _ in range(world)]
            dist.all_gather(every, out[key].detach())
            assert all(torch.equal(every[0], other) for other in every), f"{where} {key}"
    for key in needs:
        assert grads[key].dtype == case.tensors[key].dtype
        # beside eager's other rows, since the budget is that of the whole tensor
        whole = eager_grads[key].clone()
        whole[rows if key in HEAD else slice(None)] = grads[key]
        values = whole, eager_grads[key], oracle_grads[key]
        assert_within_budget(f"{where} grad_{key}", *values, spread_of(case, needs, key))


def every_strategy(rank: int, world: int) -> None:
    backends = ("torch", "triton") if INTERPRET and world == 2 else ("torch",)
    for backend in backends:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for options in TRANSFORMS:
                case = make_case(rows=37, H=24, V=V, dtype=dtype, bias=True, lora=True, **options)
                for strategy, needs in STRATEGIES:
                    compare(case, needs, rank, world, strategy=strategy, backend=backend)
        # each differentiable output alone, with and without a row dropped
        for arrives in DIFFERENTIABLE:
            for softcap in (None, 5.0):
                case = make_case(
                    rows=64, H=24, V=V, softcap=softcap, upstream=(arrives,), seed=1, ignored=0.0
                )
                for strategy, needs in (
                    ("direction", ("hidden",)),
                    ("resident", ("hidden", "weight")),
                    ("recompute", ("weight",)),
                ):
                    compare(case, needs, rank, world, strategy=strategy, backend=backend)


def exact(rank: int, world: int) -> None:
    """In fp64 nothing but the formulas is left."""
    for softcap in (None, 3.0):
        case = make_case(
            rows=30, H=12, V=V, dtype=torch.float64, bias=True, lora=True, softcap=softcap,
            upstream=DIFFERENTIABLE,
        )  # fmt: skip
        for strategy, needs in STRATEGIES[1:]:
            rows = rows_of(rank, world)
            out, grads = shard(case, rows).evaluate(
                "op", needs, outputs=ALL_OUTPUTS, group=dist.group.WORLD, strategy=strategy
            )
            oracle, oracle_grads = case.evaluate("oracle", needs)
            for key in DIFFERENTIABLE:
                torch.testing.assert_close(out[key], oracle[key], atol=1e-12, rtol=1e-12)
            for key in needs:
                part = rows if key in HEAD else slice(None)
                torch.testing.assert_close(
                    grads[key], oracle_grads[key][part], atol=1e-11, rtol=1e-11
                )


def edges(rank: int, world: int) -> None:
    group, rows = dist.group.WORLD, rows_of(rank, world)
    case = make_case(rows=16, H=8, V=V, ignored=0.0)
    hidden, weight, labels = case.tensors["hidden"], case.tensors["weight"], case.labels

    # nothing is scored
    leaves = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
    out = linear_logprob(*leaves, torch.full_like(labels, -100), group=group)
    out.logps.sum().backward()
    assert not out.logps.any() and not leaves[0].grad.any() and not leaves[1].grad.any()

    # a tie goes to the first maximum, whichever rank has it
    zeros = torch.zeros(2, 8)
    for label, expected in ((0, True), (rows_of(1, world).start, False), (V - 1, False)):
        top1 = linear_logprob(
            zeros, weight[rows], torch.tensor([label] * 2), outputs=("is_top1",), group=group
        ).is_top1
        assert top1.tolist() == [expected] * 2, label

    # a slice, of padding say, that has no probability at all
    bias = torch.zeros(V)
    last = rows_of(world - 1, world)
    bias[last] = -torch.inf
    kept = labels.clamp(max=last.start - 1)
    for strategy, needs in (("direction", False), ("recompute", True), ("resident", True)):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(needs)
        whole = linear_logprob(leaf, head, kept, bias=bias, outputs=("logps", "entropy"))
        whole.logps.sum().backward()
        mine = hidden.clone().requires_grad_()
        part = linear_logprob(
            mine,
            weight[rows].clone().requires_grad_(needs),
            kept,
            bias=bias[rows],
            outputs=("logps", "entropy"),
            group=group,
            strategy=strategy,
        )
        part.logps.sum().backward()
        torch.testing.assert_close(part.logps, whole.logps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part.entropy, whole.entropy, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.grad, leaf.grad, atol=1e-5, rtol=1e-5)

    # a label that outweighs the rest keeps its small log-prob
    sure = torch.nn.functional.normalize(weight[labels], dim=-1) * 60
    exact = make_case(rows=16, H=8, V=V, ignored=0.0)
    exact.tensors["hidden"] = sure
    compare(exact, ("hidden",), rank, world, outputs=("logps",))

    # what is wrong is said on every rank, before anything could wait
    with pytest.raises(ValueError, match="labels must be the same on every rank of group"):
        linear_logprob(hidden, weight[rows], labels.roll(rank), group=group)
    with pytest.raises(ValueError, match="labels must be the same on every rank of group"):
        linear_logprob(hidden[rank:], weight[rows], labels[rank:], group=group)
    with pytest.raises(IndexError, match=rf"outside \[0, {V}\)"):
        linear_logprob(hidden, weight[rows], labels.clone().fill_(V), group=group)
    with pytest.raises(ValueError, match="budget_bytes must be at least"):
        linear_logprob(hidden, weight[rows], labels, group=group, budget_bytes=1)


@pytest.mark.parametrize("world", [2, 3])
def test_equals_the_whole_head(world, tmp_path):
    """Outputs, gradients and their bits on every rank, in every strategy."""
    run(every_strategy, world, tmp_path)


def test_formulas_and_edges(tmp_path):
    run(exact_and_edges, 3, tmp_path)


def exact_and_edges(rank: int, world: int) -> None:
    exact(rank, world)
    edges(rank, world)
    stays_in_budget(rank, world)


def stays_in_budget(rank: int, world: int) -> None:
    """What lives at once stays under the smallest budget that is accepted."""
    N, H, width = 600, 128, 3000
    labels = torch.randint(0, world * width, (N,), generator=torch.Generator().manual_seed(0))
    for needs_head in (False, True):
        hidden = torch.randn(N, H, requires_grad=True)
        weight = torch.randn(width, H, requires_grad=needs_head)
        arguments = {"group": dist.group.WORLD, "outputs": ALL_OUTPUTS, "backend": "torch"}

        def scored(budget, hidden=hidden, weight=weight, arguments=arguments):
            return linear_logprob(hidden, weight, labels, budget_bytes=budget, **arguments)

        least = smallest_budget(scored)
        with LiveBytes() as live:
            out = scored(least)
            out.logps.sum().backward()
        returned = 4 * H * (N + width * needs_head)
        assert live.peak() <= least + returned + 64 * N, (live.peak(), least, needs_head)


def test_errors():
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup"):
        linear_logprob(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1).long(), group="tp")
