"""Public ``warmup``: runs a step until a CUDA graph can capture it."""

from collections.abc import Callable

import torch

from spo_kernels.calls.checks import fail

_OP = "warmup"


def warmup(step: Callable[[], object], *, rounds: int = 3) -> None:
    """Run a step until ``torch.cuda.graph`` can capture it.

    The step runs eagerly on a side stream, so that one-time allocations (cuBLAS's workspaces, for
    one) exist, and is then captured into a graph that is thrown away. A captured step reads nothing
    on the host, so without ``scored_rows`` it scores every row, with kernels that an eager one need
    not have used; they are compiled and loaded in that capture, which allows it
    (``capture_error_mode="relaxed"``), and not in yours, which would fail.
    ``torch.cuda.make_graphed_callables`` warms up eagerly only and would meet those kernels in its
    own capture. On a machine without a GPU there is nothing to capture: the step runs once. A
    capture computes nothing, so one more eager run follows it, and ``.grad`` and the like hold
    numbers.

    A replay costs no host time, which is most of a small call: on an H200 forward + backward of
    ``linear_logprob`` at N 256, H 896 took 0.36 ms replayed and 2.8 ms eager.

    Args:
        step: a function without arguments that runs forward and backward on the tensors that the
            graph will read and write. It really runs ``rounds + 1`` times: gradients accumulate,
            an optimizer steps.
        rounds: >= 1, eager runs before the capture.
    Raises:
        ValueError: rounds below 1.
        TypeError: a step that cannot be called.
        Exception: of the step itself.
    Source: PyTorch's notes on CUDA graphs ask for the eager runs on a side stream.
    """
    if not callable(step):
        fail(_OP, "step", "be a function without arguments", type(step).__name__, error=TypeError)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        fail(_OP, "rounds", "be an int >= 1", rounds)
    if not torch.cuda.is_available():
        step()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(rounds):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="relaxed"):
        step()
    step()
