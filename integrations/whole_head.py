"""The parameters of an LM head in one piece, however they are sharded, forward and backward."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, Partial
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import maybe_gather_lm_head_ctx


@contextmanager
def whole_head(
    weight: torch.Tensor, *others: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """Give weight and others whole, in that order, with one collective per call."""
    tensors = (weight, *others)
    if isinstance(weight, DTensor):
        yield tuple(None if tensor is None else _full_tensor(tensor) for tensor in tensors)
        return
    with maybe_gather_lm_head_ctx(*tensors):
        if not is_deepspeed_zero3_enabled():
            yield tensors
            return
        parameters = [tensor for tensor in tensors if tensor is not None]
        with saved_tensors_hooks(functools.partial(_release, parameters), _gather_again):
            yield tensors


def _full_tensor(sharded: torch.Tensor) -> torch.Tensor:
    if not isinstance(sharded, DTensor):
        return sharded
    # without placements of its own the gradient would keep every rank's share unreduced
    placements = [Partial("avg")] * sharded.device_mesh.ndim
    return sharded.full_tensor(grad_placements=placements)


def _release(parameters: list[torch.nn.Parameter], tensor: torch.Tensor) -> torch.Tensor:
    """Keep for the backward the parameter itself, whose storage ZeRO-3 takes away in between."""
    for parameter in parameters:
        if tensor.data_ptr() == parameter.data_ptr() and tensor.shape == parameter.shape:
            return parameter
    return tensor


def _gather_again(kept: torch.Tensor) -> torch.Tensor:
    if not hasattr(kept, "ds_status"):
        return kept
    with maybe_gather_lm_head_ctx(kept):
        return kept.detach().clone()
