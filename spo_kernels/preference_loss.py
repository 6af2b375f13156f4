"""Public ``preference_loss``: pairwise losses on sequence log-probs, with their gradients."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from spo_kernels._checks import (
    FLOAT_DTYPES,
    check_choice,
    check_dtype,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
    refuse_double_backward,
    resolve_backend,
)
from spo_kernels.loss_table import LOSS_TYPE_NAMES, PARAMETERS, Parameters, loss_type_of

_OP = "preference_loss"


class PreferenceLossOutput(NamedTuple):
    """Per-pair results, ``[P]`` fp32 each (fp64 for fp64 inputs)."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def preference_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor | None = None,
    ref_rejected_logps: torch.Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
    backend: str = "auto",
) -> PreferenceLossOutput:
    """Compute the preference loss of P pairs from the log-probs of whole completions.

        c = chosen_logps - ref_chosen_logps        r = rejected_logps - ref_rejected_logps
        losses = sum_i loss_weights[i] * loss_type[i](c, r)
        sigmoid: log(1 + exp(-beta (c - r)))       hinge: max(0, 1 - beta (c - r))
        ipo: (c / len_c - r / len_r - 1 / (2 beta))^2
        chosen_rewards = beta * c                  rejected_rewards = beta * r

    Loss and gradient come from one kernel launch and the backward is one multiply; all arithmetic
    is fp32 (fp64 for fp64 inputs), nothing is read back to the host, and results are bit-for-bit
    repeatable. Policy equal to reference gives a margin of exactly 0.

    Args:
        chosen_logps: ``[P]`` bf16/fp16/fp32 (fp64 on the torch backend), log-probs summed over each
            chosen completion, any stride.
        rejected_logps: ``[P]``, the same dtype, of the rejected completions.
        ref_chosen_logps, ref_rejected_logps: ``[P]`` of the reference model, any float dtype; both
            or neither, None counts as 0.
        loss_type: a name from ``loss_table.LOSS_TYPES`` or a sequence of names to mix.
        loss_weights: one finite Python float for each type; None is 1 each.
        beta: > 0. Inverse temperature of the margin.
        chosen_lengths, rejected_lengths: ``[P]`` int32/int64 completion lengths in tokens, needed
            by ``ipo``; 0 counts as 1.
        backend: "auto" (triton on a CUDA tensor, else torch), "torch" or "triton".
    Returns:
        ``PreferenceLossOutput``: ``losses``, ``chosen_rewards``, ``rejected_rewards``, each
        ``[P]`` fp32.
    Gradients: chosen_logps, rejected_logps through ``losses``. Not differentiable: reference
        log-probs, rewards; no double backward.
    Raises: ValueError (shape, range, device, unknown type), TypeError (dtype), NotImplementedError
        (backend cannot).
    Source: sigmoid: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7. hinge: Zhao et al. 2023,
        arXiv:2305.10425. ipo: Azar et al. 2023, arXiv:2310.12036, Eq. 17. ipo differs from it by:
        each score is divided by its completion length, as in TRL.
    """
    logps = {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}
    refs = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    loss_types, weights = _check_types(loss_type, loss_weights, lengths)
    _check_tensors(logps, refs, lengths)
    parameters = _check_parameters({"beta": beta})
    backend = resolve_backend(_OP, backend, chosen_logps)
    if backend == "triton":
        for name, tensor in {**logps, **refs}.items():
            if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
                fail(
                    _OP,
                    name,
                    "have dtype bfloat16, float16, float32 on backend='triton'",
                    str(tensor.dtype).removeprefix("torch."),
                    way_out="Use backend='torch'.",
                    error=TypeError,
                )
    call = _Call(backend=backend, loss_types=loss_types, weights=weights, parameters=parameters)
    if not any(loss_type_of(name).needs_lengths for name in loss_types):
        lengths = dict.fromkeys(lengths)
    return PreferenceLossOutput(
        *_PreferenceLossFunction.apply(*logps.values(), *refs.values(), *lengths.values(), call)
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """Non-tensor state of one call."""

    backend: str
    loss_types: tuple[str, ...]
    weights: tuple[float, ...]
    parameters: Parameters


class _PreferenceLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        ref_chosen: torch.Tensor | None,
        ref_rejected: torch.Tensor | None,
        chosen_lengths: torch.Tensor | None,
        rejected_lengths: torch.Tensor | None,
        call: _Call,
    ):
        ctx.set_materialize_grads(False)
        losses, grads, rewards = _backend(call.backend).preference_loss_fwd(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_lengths,
            rejected_lengths,
            loss_types=call.loss_types,
            weights=call.weights,
            parameters=call.parameters,
        )
        chosen_rewards, rejected_rewards = rewards[0], rewards[1]
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
        ctx.save_for_backward(grads)
        ctx.dtype = chosen.dtype
        return losses, chosen_rewards, rejected_rewards

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor | None, *_: None):
        refuse_double_backward(_OP)
        if grad_losses is None:
            return (None,) * 7
        (grads,) = ctx.saved_tensors
        grad_chosen, grad_rejected = (grads * grad_losses).to(ctx.dtype)
        needs_chosen, needs_rejected = ctx.needs_input_grad[:2]
        return (
            grad_chosen if needs_chosen else None,
            grad_rejected if needs_rejected else None,
            *(None,) * 5,
        )


def _backend(name: str):
    if name == "triton":
        from spo_kernels.kernels import preference_loss

        return preference_loss
    from spo_kernels import _torch_losses

    return _torch_losses


def _check_types(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    lengths: dict[str, torch.Tensor | None],
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the names and weights of the mix."""
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    if not isinstance(names, Sequence) or not names:
        got = repr(loss_type)
        fail(_OP, "loss_type", "be a name or a non-empty sequence of names", got, error=TypeError)
    for name in names:
        check_choice(_OP, "loss_type", name, LOSS_TYPE_NAMES)
        for argument, value in lengths.items():
            if value is None and loss_type_of(name).needs_lengths:
                fail(_OP, argument, f"be given for loss_type={name!r}", None)
    if loss_weights is None:
        return tuple(names), (1.0,) * len(names)
    if not isinstance(loss_weights, Sequence):
        got = type(loss_weights).__name__
        fail(_OP, "loss_weights", "be a sequence of Python floats", got, error=TypeError)
    if len(loss_weights) != len(names):
        fail(_OP, "loss_weights", f"have one weight for each of {len(names)} types", loss_weights)
    for weight in loss_weights:
        _check_number("loss_weights", weight)
        if not math.isfinite(weight):
            fail(_OP, "loss_weights", "be finite", weight)
    return tuple(names), tuple(float(weight) for weight in loss_weights)


def _check_parameters(values: dict[str, float]) -> Parameters:
    """Check every parameter against its range in the table, used by the types or not."""
    for parameter in PARAMETERS:
        value = values[parameter.name]
        _check_number(parameter.name, value)
        if not parameter.low < value < parameter.high:
            low, high = parameter.low, parameter.high
            requirement = f"be a finite float > {low:g}"
            if math.isfinite(high):
                requirement = f"be between {low:g} and {high:g}"
            fail(_OP, parameter.name, requirement, value)
    return Parameters(**{name: float(value) for name, value in values.items()})


def _check_number(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(_OP, argument, "be a Python float", type(value).__name__, error=TypeError)


def _check_tensors(
    logps: dict[str, torch.Tensor],
    refs: dict[str, torch.Tensor | None],
    lengths: dict[str, torch.Tensor | None],
) -> None:
    """Refuse tensors that do not form P pairs."""
    for optional in (refs, lengths):
        given = [name for name, tensor in optional.items() if tensor is not None]
        if len(given) == 1:
            missing = next(name for name in optional if name not in given)
            fail(_OP, missing, f"be given where {given[0]} is", None)
    named = {**logps, **refs, **lengths}
    named = {name: t for name, t in named.items() if t is not None or name in logps}
    for name, tensor in named.items():
        check_tensor(_OP, name, tensor)
        integer = name in lengths
        floats = (*FLOAT_DTYPES, torch.float64)
        check_dtype(_OP, name, tensor, (torch.int32, torch.int64) if integer else floats)

    chosen, rejected = logps.values()
    check_shape(_OP, "chosen_logps", chosen, (None,), "[P]")
    P = chosen.numel()
    for name, tensor in named.items():
        if name == "rejected_logps" and tensor.dim() == 1 and (P + tensor.numel()) % 2:
            fail(
                _OP,
                name,
                f"have shape [P] with P={P} like chosen_logps",
                tuple(tensor.shape),
                way_out=f"A chosen/rejected batch must be even, got B={P + tensor.numel()}.",
            )
        check_shape(_OP, name, tensor, (P,), f"[P] with P={P} like chosen_logps")
    if rejected.dtype != chosen.dtype:
        want, got = (str(t.dtype).removeprefix("torch.") for t in (chosen, rejected))
        fail(_OP, "rejected_logps", f"have dtype {want} like chosen_logps", got, error=TypeError)
    check_same_device(_OP, named)
