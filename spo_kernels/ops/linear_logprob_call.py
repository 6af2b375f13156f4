"""From the checked settings of a ``linear_logprob`` call to its plan and its backend."""

from operator import index

import torch

from spo_kernels.calls.linear_logprob import Call, Rows, Settings, Shard
from spo_kernels.calls.plan import GRAD_INPUTS
from spo_kernels.planner.linear_logprob import plan_sizes
from spo_kernels.planner.models import Sizes


def backend_of(name: str):
    """Return the module that runs the forward and backward of a call."""
    if name == "triton":
        from spo_kernels.kernels import linear_logprob

        return linear_logprob
    from spo_kernels.torch_backend import linear_logprob

    return linear_logprob


def planned_device(backend: str, device: torch.device) -> str:
    """Return the planner's name of the device that a backend runs on."""
    if backend == "torch":
        return "cpu"
    from spo_kernels.kernels.device import arch_of

    return f"cuda:{arch_of(device)}"


def needed_grads(tensors: tuple[torch.Tensor | None, ...]) -> frozenset[str]:
    """Return which of hidden, weight, bias, lora_a and lora_b need a gradient."""
    return frozenset(
        name
        for name, tensor in zip(GRAD_INPUTS, tensors, strict=True)
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    )


def sizes_of(
    settings: Settings,
    rows: Rows,
    tensors: tuple[torch.Tensor | None, ...],
    shard: Shard | None = None,
) -> Sizes:
    """Return what the planner asks about a call; ``tensors`` are those of ``GRAD_INPUTS``."""
    hidden, weight, _, _, lora_b = tensors
    return Sizes(
        N=rows.count,
        # index() makes plain integers of sizes that are symbols in a traced graph
        H=index(weight.shape[1]),
        V=index(weight.shape[0]),
        R=0 if lora_b is None else index(lora_b.shape[1]),
        dtype=settings.compute_dtype,
        hidden_dtype=hidden.dtype,
        weight_dtype=weight.dtype,
        needs=settings.needs_grad,
        outputs=settings.outputs,
        capped=settings.softcap is not None,
        gathered=rows.index is not None,
        head_strided=weight.stride(1) != 1,
        ranks=1 if shard is None else shard.group.size(),
    )


def planned_call(
    settings: Settings,
    rows: Rows,
    tensors: tuple[torch.Tensor | None, ...],
    shard: Shard | None = None,
) -> Call:
    """Plan a call on these rows."""
    plan = plan_sizes(
        sizes_of(settings, rows, tensors, shard),
        budget_bytes=settings.budget_bytes,
        strategy=settings.strategy,
        device=planned_device(settings.backend, tensors[0].device),
    )
    return Call(settings, plan, shard)
