"""The most rows one call can score in a given memory: by the planner, and by trying on a GPU.

Counted are hidden states, head, labels, workspace and the gradients returned; the rest of a model
and its activations are not there.
"""

import dataclasses
import gc
from collections.abc import Callable

import torch

from benchmarks import providers
from benchmarks.workloads import DTYPES, MODEL_SHAPES, Workload, both_heads

MEMORIES_GB = (80, 24)
_LEAST, _MOST = 256, 1 << 26
_LABEL_BYTES = 8


def cases() -> list[Workload]:
    """Return the model shapes with both heads; rows are what is looked for."""
    shapes = [Workload(name, _LEAST, *sizes) for name, sizes in MODEL_SHAPES.items()]
    return [case for shape in shapes for case in both_heads(shape)]


def planned_rows(workload: Workload, memory_bytes: int, device: str) -> int:
    """Return the most rows for which a plan fits beside the tensors of the call."""

    def fits(rows: int) -> bool:
        case = dataclasses.replace(workload, rows=rows)
        item = DTYPES[case.dtype].itemsize
        inputs = (rows + case.vocab) * case.hidden * item + rows * _LABEL_BYTES
        budget = memory_bytes - inputs - case.gradient_bytes
        if budget <= 0:
            return False
        try:
            providers.plan_of(case, device, budget_bytes=budget)
        except ValueError:
            return False
        return True

    return most_rows(fits)


def measured_rows(workload: Workload, memory_bytes: int, near: int) -> int:
    """Return the most rows that ran on this GPU, to an eighth of ``near``, within the memory."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total))

    def fits(rows: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        case = dataclasses.replace(workload, rows=rows)
        try:
            providers.step_of("spo", case, "cuda")()
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    try:
        return most_rows(fits, least=max(1, near // 2), most=2 * near, step=max(1, near // 8))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def most_rows(
    fits: Callable[[int], bool], *, least: int = _LEAST, most: int = _MOST, step: int = _LEAST
) -> int:
    """Return the largest rows that fit, to ``step``, by bisection; 0 where ``least`` does not."""
    if not fits(least):
        return 0
    while most - least > step:
        middle = (least + most) // 2
        if fits(middle):
            least = middle
        else:
            most = middle
    return least
