"""Public ``bradley_terry_loss``: the pairwise loss of a reward model, with its gradient."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from spo_kernels.calls.backends import refuse_fp64_on_triton, resolve_backend
from spo_kernels.calls.checks import (
    FLOAT_DTYPES,
    check_dtype,
    check_parameters,
    check_same_device,
    check_shape,
    check_tensor,
    dtype_name,
    fail,
)
from spo_kernels.calls.loss_table import Parameter
from spo_kernels.ops.loss_op import Like, loss_op
from spo_kernels.torch_backend import bradley_terry_loss as torch_backend

_OP = "bradley_terry_loss"
_CENTER = Parameter(
    "center_rewards_coefficient", 0.0, 0.0, float("inf"), "pull towards rewards of 0", closed="low"
)


class BradleyTerryLossOutput(NamedTuple):
    """Per-pair results: ``losses`` fp32 (fp64 for an fp64 input), ``is_correct`` bool."""

    losses: torch.Tensor
    is_correct: torch.Tensor


def bradley_terry_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margins: torch.Tensor | None = None,
    *,
    center_rewards_coefficient: float | None = None,
    backend: str = "auto",
) -> BradleyTerryLossOutput:
    """Compute the Bradley-Terry loss of P pairs from the rewards a reward model gives them.

        losses = log(1 + exp(-(chosen_rewards - rejected_rewards - margins)))
                 + center_rewards_coefficient * (chosen_rewards + rejected_rewards)^2
        is_correct = chosen_rewards > rejected_rewards

    Loss and gradient come from one kernel launch and the backward is one multiply; all arithmetic
    is fp32 (fp64 for fp64 inputs), so half-precision rewards lose nothing in their difference.
    Nothing is read back to the host, and results are bit-for-bit repeatable. Under
    ``torch.compile`` the kernel is one node of the graph, with the bits of an eager call; the torch
    backend is traced and fused.

    Args:
        chosen_rewards: ``[P]``, or ``[P, 1]`` as a head with one output returns it,
            bf16/fp16/fp32 (fp64 on the torch backend), any stride.
        rejected_rewards: the same shape and dtype, of the rejected responses.
        margins: ``[P]`` any float dtype, how far apart each pair should be; None counts as 0. TRL's
            column ``margin``.
        center_rewards_coefficient: finite, >= 0. Pulls rewards towards mean 0; None counts as 0.
            Recommended by TRL: 0.01.
        backend: "auto" (triton on a CUDA tensor, else torch), "torch" or "triton".
    Returns:
        ``BradleyTerryLossOutput``: ``losses`` ``[P]`` fp32 and ``is_correct`` ``[P]`` bool, which
        does not look at margins; a tie or a NaN is not correct. Their means are TRL's ``loss`` and
        ``accuracy``.
    Gradients: chosen_rewards, rejected_rewards through ``losses``. Not differentiable: margins; no
        double backward.
    Raises:
        ValueError: shape, range or device.
        TypeError: dtype.
        NotImplementedError: the backend cannot.
    Source: Ouyang et al. 2022, arXiv:2203.02155, Eq. 1; margins: Touvron et al. 2023,
        arXiv:2307.09288, Eq. 2; centring: Eisenstein et al. 2023, arXiv:2312.09244, Eq. 2.
    """
    rewards = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    _check_tensors(rewards, margins)
    values = {_CENTER.name: _CENTER.default}
    if center_rewards_coefficient is not None:
        values[_CENTER.name] = center_rewards_coefficient
    center = check_parameters(_OP, values, (_CENTER,))[_CENTER.name]
    backend = resolve_backend(_OP, backend, chosen_rewards)
    refuse_fp64_on_triton(_OP, backend, {**rewards, "margins": margins})
    call = _Call(backend=backend, center=center)
    flat = (tensor.squeeze(-1) if tensor.dim() == 2 else tensor for tensor in rewards.values())
    return BradleyTerryLossOutput(*_run(call, *flat, margins))


@dataclasses.dataclass(frozen=True)
class _Call:
    """Non-tensor state of one call."""

    backend: str
    center: float

    def packed(self) -> tuple[list[str], list[float]]:
        return [self.backend], [self.center]

    @classmethod
    def unpacked(cls, words: Sequence[str], numbers: Sequence[float]) -> "_Call":
        return cls(*words, *numbers)


def _forward(
    call: _Call, chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the outputs, then grads [2, P]."""
    losses, grads, is_correct = _backend(call.backend).bradley_terry_loss_fwd(
        chosen, rejected, margins, center=call.center
    )
    return losses, is_correct, grads


def _like(
    call: _Call, chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | None
) -> tuple[Like, Like, Like]:
    """Return what the results of ``_forward`` are allocated as."""
    P = chosen.shape[0]
    return Like((P,)), Like((P,), torch.bool), Like((2, P))


def _backward(
    call: _Call,
    grad_losses: torch.Tensor,
    saved: Sequence[torch.Tensor],
    likes: Sequence[Like],
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of chosen and rejected."""
    (grads,) = saved
    grad_chosen, grad_rejected = (grads * grad_losses).to(likes[0].dtype)
    return grad_chosen if needs[0] else None, grad_rejected if needs[1] else None


_run = loss_op(
    _OP,
    "chosen, rejected, margins?",
    call_type=_Call,
    differentiable=2,
    outputs=2,
    saved=(),
    forward=_forward,
    like=_like,
    backward=_backward,
)


def _backend(name: str):
    if name == "triton":
        from spo_kernels.kernels import bradley_terry_loss

        return bradley_terry_loss
    return torch_backend


def _check_tensors(rewards: dict[str, torch.Tensor], margins: torch.Tensor | None) -> None:
    """Refuse tensors that do not form P pairs."""
    named = rewards if margins is None else {**rewards, "margins": margins}
    for name, tensor in named.items():
        check_tensor(_OP, name, tensor)
        check_dtype(_OP, name, tensor, (*FLOAT_DTYPES, torch.float64))
    chosen, rejected = rewards.values()
    if chosen.dim() != 1 and (chosen.dim() != 2 or chosen.shape[1] != 1):
        fail(_OP, "chosen_rewards", "have shape [P] or [P, 1]", tuple(chosen.shape))
    P = chosen.shape[0]
    spec = "[P, 1]" if chosen.dim() == 2 else "[P]"
    spec += " with P={0} like chosen_rewards"
    check_shape(_OP, "rejected_rewards", rejected, tuple(chosen.shape), spec)
    if margins is not None:
        check_shape(_OP, "margins", margins, (P,), "[P] with P={0}")
    if rejected.dtype != chosen.dtype:
        want, got = (dtype_name(t.dtype) for t in (chosen, rejected))
        fail(
            _OP, "rejected_rewards", f"have dtype {want} like chosen_rewards", got, error=TypeError
        )
    check_same_device(_OP, named)
