"""A loss and its backward: as an autograd function, and as custom ops in a ``torch.compile`` graph.

In a graph forward and backward are one node each. They run the backend of an eager call, so a graph
has its bits; sizes may be symbols; and so may Python numbers, which then reach the op in a tensor
on the host, because a number that an op takes as such is a constant of the graph.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch

from spo_kernels.calls.checks import refuse_double_backward


class Like(NamedTuple):
    """Shape and dtype in which a tensor is allocated."""

    shape: Sequence[int]
    dtype: torch.dtype = torch.float32


class LossCall(Protocol):
    """The frozen non-tensor state of a call, as strings and numbers and back."""

    @property
    def backend(self) -> str: ...

    def packed(self) -> tuple[list[str], list[float]]: ...

    @classmethod
    def unpacked(cls, words: Sequence[str], numbers: Sequence[float]) -> Self: ...


def loss_op(
    name: str,
    tensors: str,
    *,
    call_type: type[LossCall],
    differentiable: int,
    outputs: int,
    saved: tuple[str, ...],
    forward: Callable[..., Sequence[torch.Tensor | None]],
    like: Callable[..., Sequence[Like | None]],
    backward: Callable[..., Sequence[torch.Tensor | None]],
    traced_backends: tuple[str, ...] = ("torch",),
) -> Callable[..., Sequence[torch.Tensor]]:
    """Make the autograd function of a loss and register ``spo_kernels::<name>_fwd`` and ``_bwd``.

    Args:
        tensors: the inputs in order, ``"logps, mask?"``; one with a ``?`` may be None.
        call_type: type of the calls, the first argument of the three functions.
        differentiable: so many of the inputs, the first ones, may need a gradient.
        outputs: so many of ``forward``'s results are returned, the first of them differentiable;
            the others are for the backward.
        saved: the inputs that the backward reads.
        forward: ``(call, *tensors)`` -> results.
        like: ``(call, *tensors)`` -> ``Like`` of each result, None where that is None.
        backward: ``(call, grad_losses, saved, likes, needs)`` -> gradients of the differentiable
            inputs; ``saved`` are the saved inputs, then the results that are no output; ``likes``
            and ``needs`` describe the differentiable inputs.
        traced_backends: backends whose own operations a compiler traces, to fuse them, instead of
            taking the custom ops.
    Returns:
        ``(call, *tensors)`` -> outputs.
    """
    names = [text.strip() for text in tensors.split(",")]
    count = len(names)
    places = [[text.removesuffix("?") for text in names].index(wanted) for wanted in saved]
    inputs_schema = ", ".join(
        f"Tensor{'?' * text.endswith('?')} {text.removesuffix('?')}" for text in names
    )

    @functools.partial(
        torch.library.custom_op,
        f"spo_kernels::{name}_fwd",
        mutates_args=(),
        schema=f"({inputs_schema}, {_CALL}) -> Tensor[]",
    )
    def forward_op(*arguments: Any) -> list[torch.Tensor]:
        inputs, call = arguments[:count], _unpacked(call_type, *arguments[count:])
        return _owned(value for value in forward(call, *inputs) if value is not None)

    def results_like(arguments: tuple) -> Sequence[Like | None]:
        # sizes and dtypes depend on no number
        numbers = [0.0] * _numbers_of(*arguments[count:])
        return like(call_type.unpacked(arguments[count], numbers), *arguments[:count])

    @forward_op.register_fake
    def _(*arguments):
        return [
            arguments[0].new_empty(want.shape, dtype=want.dtype)
            for want in results_like(arguments)
            if want is not None
        ]

    @functools.partial(
        torch.library.custom_op,
        f"spo_kernels::{name}_bwd",
        mutates_args=(),
        schema=f"(Tensor grad_losses, Tensor?[] saved, {_LIKES}, bool[] needs, {_CALL})"
        " -> Tensor[]",
    )
    def backward_op(grad_losses, saved, sizes, forms, needs, *packed) -> list[torch.Tensor]:
        grads = backward(
            _unpacked(call_type, *packed), grad_losses, saved, _likes_of(sizes, forms), needs
        )
        return _owned(grad for grad, needed in zip(grads, needs, strict=True) if needed)

    @backward_op.register_fake
    def _(grad_losses, saved, sizes, forms, needs, *packed):
        return [
            grad_losses.new_empty(want.shape, dtype=want.dtype)
            for want, needed in zip(_likes_of(sizes, forms), needs, strict=True)
            if needed
        ]

    def setup_context(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
        ctx.set_materialize_grads(False)
        *packed, traced = inputs[count:]
        ctx.packed = packed
        ctx.likes = _packed_likes(inputs[:differentiable])
        found = iter(output[outputs:])
        kept = [None if want is None else next(found) for want in results_like(inputs)[outputs:]]
        ctx.save_for_backward(traced, *(inputs[i] for i in places), *kept)

    def run_backward(ctx: Any, grads: list[torch.Tensor | None]):
        needs = list(ctx.needs_input_grad[:differentiable])
        found = iter(())
        if grads[0] is not None and any(needs):
            traced, *kept = ctx.saved_tensors
            found = iter(backward_op(grads[0], kept, *ctx.likes, needs, *ctx.packed, traced))
        given = [next(found, None) if needed else None for needed in needs]
        return (*given, *(None,) * (count - differentiable + 3))

    forward_op.register_autograd(run_backward, setup_context=setup_context)

    class LossFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: LossCall, *inputs: torch.Tensor | None):
            ctx.set_materialize_grads(False)
            results = forward(call, *inputs)
            ctx.call = call
            ctx.likes = [
                None if tensor is None else Like(tensor.shape, tensor.dtype)
                for tensor in inputs[:differentiable]
            ]
            ctx.save_for_backward(*(inputs[i] for i in places), *results[outputs:])
            ctx.mark_non_differentiable(*results[1:outputs])
            return tuple(results[:outputs])

        @staticmethod
        def backward(ctx: Any, grad_losses: torch.Tensor | None, *_: None):
            refuse_double_backward(name)
            nothing = (None,) * (1 + count)
            if grad_losses is None:
                return nothing
            needs = ctx.needs_input_grad[1 : 1 + differentiable]
            grads = backward(ctx.call, grad_losses, ctx.saved_tensors, ctx.likes, needs)
            return (None, *grads, *nothing[1 + differentiable :])

    def run(call: LossCall, *inputs: torch.Tensor | None) -> Sequence[torch.Tensor]:
        if torch.compiler.is_compiling() and call.backend not in traced_backends:
            losses, *others = forward_op(*inputs, *_packed(call))[:outputs]
            return [losses, *(value.detach() for value in others)]
        return LossFunction.apply(call, *inputs)

    return run


# of a call both ops take its words and its numbers: as such, or, where one is a symbol, in a tensor
_CALL = "str[] words, float[]? numbers, Tensor? traced"
# shapes of the differentiable inputs one after the other, then "axes:dtype" of each, "" for None
_LIKES = "SymInt[] sizes, str[] forms"


def _packed(call: LossCall) -> tuple[list[str], list[float] | None, torch.Tensor | None]:
    words, numbers = call.packed()
    is_static = torch.fx.experimental.symbolic_shapes.has_static_value
    for number in numbers:
        if not is_static(number):
            one = torch.ones((), dtype=torch.float64, device="cpu")
            # a product is what the compiler turns back into an input of the graph
            return words, None, torch.stack([one * number for number in numbers])
    # an empty list would pass for one of tensors
    return words, numbers or None, None


def _numbers_of(
    words: Sequence[str], numbers: Sequence[float] | None, traced: torch.Tensor | None
) -> int:
    return len(numbers or ()) if traced is None else traced.shape[0]


def _unpacked(
    call_type: type[LossCall],
    words: Sequence[str],
    numbers: Sequence[float] | None,
    traced: torch.Tensor | None,
) -> LossCall:
    return call_type.unpacked(words, numbers or () if traced is None else traced.tolist())


def _packed_likes(tensors: Sequence[torch.Tensor | None]) -> tuple[list[int], list[str]]:
    sizes = [size for tensor in tensors if tensor is not None for size in tensor.shape]
    forms = [
        "" if tensor is None else f"{tensor.dim()}:{str(tensor.dtype).removeprefix('torch.')}"
        for tensor in tensors
    ]
    return sizes, forms


def _likes_of(sizes: Sequence[int], forms: Sequence[str]) -> list[Like | None]:
    likes, start = [], 0
    for form in forms:
        if not form:
            likes.append(None)
            continue
        axes, dtype = form.split(":")
        stop = start + int(axes)
        likes.append(Like(torch.Size(sizes[start:stop]), getattr(torch, dtype)))
        start = stop
    return likes


def _owned(values: Any) -> list[torch.Tensor]:
    """Return contiguous tensors, no two in one storage, as a custom op must."""
    owned, seen = [], set()
    for value in values:
        value = value.contiguous()
        place = value.untyped_storage().data_ptr()
        owned.append(value.clone() if place in seen else value)
        seen.add(place)
    return owned
