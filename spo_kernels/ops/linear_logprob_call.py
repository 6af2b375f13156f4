"""From what a ``linear_logprob`` call was asked for to what it runs, eager and traced alike."""

from operator import index
from typing import Any, NamedTuple

import torch

from spo_kernels.calls.linear_logprob import Call, Rows, Shard
from spo_kernels.planner.linear_logprob import GRAD_INPUTS, plan_linear_logprob


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


class Settings(NamedTuple):
    """What a call was asked for, in the order in which the custom ops take it."""

    outputs: str  # names, separated by commas
    needs_grad: str
    strategy: str
    backend: str
    compute_dtype: torch.dtype
    temperature: float
    logit_scale: float
    softcap: float | None
    budget_bytes: int | None

    def question(self, rows: Rows, tensors: tuple[torch.Tensor | None, ...]) -> dict[str, Any]:
        """Return what ``plan_linear_logprob`` asks about a call, but for its wishes and its device.

        ``tensors`` are hidden, weight, bias, lora_a and lora_b.
        """
        hidden, weight, bias, _, lora_b = tensors
        return {
            "rows": rows.count,
            # index() makes plain integers of sizes that are symbols in a traced graph
            "hidden_size": index(weight.shape[1]),
            "vocab_size": index(weight.shape[0]),
            "dtype": self.compute_dtype,
            "weight_dtype": weight.dtype,
            "needs_grad": frozenset(names_of(self.needs_grad)),
            "outputs": names_of(self.outputs),
            "bias": bias is not None,
            "lora_rank": 0 if lora_b is None else index(lora_b.shape[1]),
            "softcap": self.softcap,
            "gathered": rows.index is not None,
            "hidden_dtype": hidden.dtype,
            "head_copied": weight.stride(1) != 1,
        }

    def planned(
        self, rows: Rows, tensors: tuple[torch.Tensor | None, ...], shard: Shard | None = None
    ) -> Call:
        """Return the call for these rows."""
        question = self.question(rows, tensors)
        plan = plan_linear_logprob(
            **question,
            group_size=1 if shard is None else shard.group.size(),
            budget_bytes=self.budget_bytes,
            strategy=self.strategy,
            device=planned_device(self.backend, tensors[0].device),
        )
        return Call(
            backend=self.backend,
            strategy=plan.strategy,
            row_chunk=plan.row_chunk,
            vocab_chunk=plan.vocab_chunk,
            outputs=frozenset(question["outputs"]),
            needs_grad=question["needs_grad"],
            compute_dtype=self.compute_dtype,
            temperature=self.temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            shard=shard,
        )


def names_of(joined: str) -> tuple[str, ...]:
    """Return the names that ``joined`` separates by commas."""
    return tuple(joined.split(",")) if joined else ()
