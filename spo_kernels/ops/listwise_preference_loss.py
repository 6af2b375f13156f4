"""Public ``listwise_preference_loss``: losses on lists of labelled responses, with gradients."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from spo_kernels.calls.backends import refuse_fp64_on_triton, resolve_backend
from spo_kernels.calls.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_dtype,
    check_parameters,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
)
from spo_kernels.calls.loss_table import (
    LISTWISE_LOSS_TYPES,
    LISTWISE_PARAMETERS,
    ListwiseParameters,
)
from spo_kernels.ops.loss_op import Like, loss_op
from spo_kernels.torch_backend import listwise_preference_loss as torch_backend

_OP = "listwise_preference_loss"
_MAX_RESPONSES = 64


class ListwisePreferenceLossOutput(NamedTuple):
    """Per-list results; only ``losses`` is differentiable."""

    losses: torch.Tensor
    rewards: torch.Tensor
    counted: torch.Tensor


def listwise_preference_loss(
    logps: torch.Tensor,
    labels: torch.Tensor,
    ref_logps: torch.Tensor | None = None,
    *,
    loss_type: str = "neural_ndcg",
    beta: float = 0.1,
    ndcg_temperature: float = 1.0,
    ndcg_alpha: float = 25.0,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> ListwisePreferenceLossOutput:
    """Compute the loss of B lists, each the K labelled responses to one prompt.

        y = beta * (logps - ref_logps)             psi = labels
        losses[b] = loss_type(y[b], psi[b])        rewards = y
        list_mle: sum_k log(sum_(l >= k) exp(y_l)) - y_k, in order of falling psi
        all_pairs: mean over pairs psi_i > psi_j of sp(-(y_i - y_j))

    and four more rows of ``loss_table.LISTWISE_LOSS_TYPES``, which has every formula. Loss and
    gradient come from one kernel launch, in which a list's ``[K, K]`` matrices stay, and the
    backward is one multiply; all arithmetic is fp32 (fp64 for fp64 inputs), nothing is read back to
    the host, and results are bit-for-bit repeatable. Under ``torch.compile`` the kernel is one node
    of the graph, with the bits of an eager call; the torch backend is traced and fused.

    A list counts if it holds two responses or more and its labels say something: an ideal DCG above
    0 for the NDCG losses, two different labels for the losses over pairs. One that does not count
    has loss 0 and gradient 0, so that ``losses.sum() / counted.sum()`` is the papers' mean. A list
    with a score or a label that is not finite counts and is NaN.

    Labels are in any order. Tied ones are no pair; ``list_mle`` and ``best_vs_rest`` take the
    earlier of two tied responses as the better. Gains ``2^psi - 1`` are divided by
    ``2^max(psi, 0)`` before anything is summed, so NDCG cannot overflow; ``lipo_lambda``'s are not
    normalised, as in its paper, and need labels below 128.

    Args:
        logps: ``[B, K]`` bf16/fp16/fp32 (fp64 on the torch backend), K from 2 to 64, log-probs
            summed over each completion, any stride.
        labels: ``[B, K]`` any float dtype, relevance of each response, larger is better. NDCG
            expects them at 0 or above: negative ones are negative gains.
        ref_logps: ``[B, K]`` of the reference model, any float dtype, None counts as 0.
        loss_type: a name from ``loss_table.LISTWISE_LOSS_TYPES``.
        beta: > 0. Inverse temperature of the scores.
        ndcg_temperature: > 0. Temperature of NeuralSort, the closer to 0 the nearer to a true sort.
        ndcg_alpha: > 0. Steepness of ApproxNDCG's ranks.
        mask: ``[B, K]`` bool, true where a response is; None is everywhere. What lies elsewhere is
            not read and gets gradient 0 and reward 0. Where padding is marked by the label -1, as
            in the authors' code, pass ``labels != -1``.
        backend: "auto" (triton on a CUDA tensor, else torch), "torch" or "triton".
    Returns:
        ``ListwisePreferenceLossOutput``: ``losses`` ``[B]`` fp32, ``rewards`` ``[B, K]`` fp32,
        ``counted`` ``[B]`` bool.
    Gradients: logps through ``losses``. Not differentiable: labels, reference log-probs, the
        weights of ``lipo_lambda``, the other outputs; no double backward.
    Raises:
        ValueError: shape, range, device or an unknown type.
        TypeError: dtype.
        NotImplementedError: the backend cannot.
    Source: neural_ndcg, approx_ndcg: Zhao et al. 2024, arXiv:2410.04346. neural_ndcg differs from
        it by: always 50 Sinkhorn rounds, where the authors' code stops all lists of a batch
        together at a tolerance of 1e-6, no rounding to fp16, no 1e-10 beside the ideal DCG.
        lipo_lambda: Liu et al. 2024, arXiv:2402.01878. list_mle: Xia et al. 2008.
    """
    check_choice(_OP, "loss_type", loss_type, (row.name for row in LISTWISE_LOSS_TYPES))
    values = {"beta": beta, "ndcg_temperature": ndcg_temperature, "ndcg_alpha": ndcg_alpha}
    parameters = ListwiseParameters(**check_parameters(_OP, values, LISTWISE_PARAMETERS))
    floats = {"logps": logps, "labels": labels, "ref_logps": ref_logps}
    _check_tensors(floats, mask)
    backend = resolve_backend(_OP, backend, logps)
    refuse_fp64_on_triton(_OP, backend, floats)
    call = _Call(backend=backend, loss_type=loss_type, parameters=parameters)
    return ListwisePreferenceLossOutput(*_run(call, logps, ref_logps, labels, mask))


@dataclasses.dataclass(frozen=True)
class _Call:
    """Non-tensor state of one call."""

    backend: str
    loss_type: str
    parameters: ListwiseParameters

    def packed(self) -> tuple[list[str], list[float]]:
        return [self.backend, self.loss_type], [*self.parameters]

    @classmethod
    def unpacked(cls, words: Sequence[str], numbers: Sequence[float]) -> "_Call":
        return cls(*words, ListwiseParameters(*numbers))


def _forward(
    call: _Call,
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Return the outputs, then grads [B, K]."""
    losses, grads, rewards, counted = _backend(call.backend).listwise_preference_loss_fwd(
        logps,
        ref_logps,
        labels,
        mask,
        loss_type=call.loss_type,
        parameters=call.parameters,
    )
    return losses, rewards, counted, grads


def _like(
    call: _Call,
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[Like, ...]:
    """Return what the results of ``_forward`` are allocated as."""
    B, K = logps.shape
    return Like((B,)), Like((B, K)), Like((B,), torch.bool), Like((B, K))


def _backward(
    call: _Call,
    grad_losses: torch.Tensor,
    saved: Sequence[torch.Tensor],
    likes: Sequence[Like],
    needs: Sequence[bool],
) -> tuple[torch.Tensor]:
    """Return the gradient of logps."""
    (grads,) = saved
    return ((grads * grad_losses[:, None]).to(likes[0].dtype),)


_run = loss_op(
    _OP,
    "logps, ref_logps?, labels, mask?",
    call_type=_Call,
    differentiable=1,
    outputs=3,
    saved=(),
    forward=_forward,
    like=_like,
    backward=_backward,
)


def _backend(name: str):
    if name == "triton":
        from spo_kernels.kernels import listwise_preference_loss

        return listwise_preference_loss
    return torch_backend


def _check_tensors(floats: dict[str, torch.Tensor | None], mask: torch.Tensor | None) -> None:
    """Refuse tensors that do not form B lists of K."""
    named = {name: t for name, t in floats.items() if t is not None or name != "ref_logps"}
    for name, tensor in named.items():
        check_tensor(_OP, name, tensor)
        check_dtype(_OP, name, tensor, (*FLOAT_DTYPES, torch.float64))
    if mask is not None:
        check_tensor(_OP, "mask", mask)
        check_dtype(_OP, "mask", mask, (torch.bool,))
        named["mask"] = mask

    logps = floats["logps"]
    check_shape(_OP, "logps", logps, (None, None), "[B, K]")
    B, K = logps.shape
    if not 2 <= K <= _MAX_RESPONSES:
        fail(_OP, "logps", f"have 2 to {_MAX_RESPONSES} columns (responses K)", K)
    for name, tensor in named.items():
        check_shape(_OP, name, tensor, (B, K), "[B, K] with B={0}, K={1} like logps")
    check_same_device(_OP, named)
