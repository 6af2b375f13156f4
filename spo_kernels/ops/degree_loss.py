"""Public ``degree_loss``: SPO's self-supervised preference-degree loss and its exact gradients."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from spo_kernels.calls.backends import refuse_fp64_on_triton, resolve_backend
from spo_kernels.calls.checks import (
    FLOAT_DTYPES,
    check_dtype,
    check_same_device,
    check_shape,
    check_tensor,
    compute_dtype,
    fail,
)
from spo_kernels.ops.loss_op import Like, loss_op
from spo_kernels.torch_backend import degree_loss as torch_degree_loss

_OP = "degree_loss"
_MAX_DEGREES = 16


class DegreeLossOutput(NamedTuple):
    """Per-segment results; only ``losses`` is differentiable."""

    losses: torch.Tensor
    correct_views: torch.Tensor
    counted_views: torch.Tensor
    view_mask: torch.Tensor


def degree_loss(
    hidden: torch.Tensor,
    removal_levels: torch.Tensor,
    segment_offsets: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None = None,
    *,
    center_views: bool = False,
    backend: str = "auto",
) -> DegreeLossOutput:
    """Classify, for each response, how much of its key content each of its K views has lost.

        view k keeps the rows of a segment with level 0 or level > k
        pooled[s, k] = mean of hidden over the rows view k keeps
        losses[s]    = mean over counted k of -log softmax(head_weight pooled[s, k] + head_bias)[k]

    View 0 is the whole response and view K - 1 has no key content left. A view equal to the one
    before it (no row has level k) is left out, so is a view that keeps no row, and a segment
    without key content (no level above 0) counts no view and has loss 0. The hidden states are read
    once, into per-level sums ``[S, K, H]``, of which the views are running sums; no ``[N, K, H]``
    is formed. All arithmetic is fp32 (fp64 for fp64 inputs), nothing is read back to the host, and
    results are bit-for-bit repeatable (torch backend on a GPU: under
    ``torch.use_deterministic_algorithms``). Under ``torch.compile`` the op is one node of the
    graph, with the bits of an eager call.

    Args:
        hidden: ``[N, H]`` bf16/fp16/fp32 (fp64 on the torch backend), any row stride, last axis
            contiguous or copied.
        removal_levels: ``[N]`` int8: 0 is never removed, 1..K-1 is removed by views k >= level, -1
            is no part of a response. Any other level makes its segment's loss NaN.
        segment_offsets: ``[S + 1]`` int64, not decreasing; segment s is rows
            ``offsets[s]:offsets[s + 1]`` and may be empty. Rows outside every segment are skipped.
        head_weight: ``[K, H]``, K from 2 to 16, any of the float dtypes.
        head_bias: ``[K]``, head_weight's dtype, or None.
        center_views: subtract each response's mean over its counted views before the head.
        backend: "auto" (triton on a CUDA tensor, else torch), "torch" or "triton".
    Returns:
        ``DegreeLossOutput``: ``losses`` ``[S]`` fp32, ``correct_views`` and ``counted_views``
        ``[S]`` int32, ``view_mask`` ``[S, K]`` bool, true where a view is counted.
    Gradients: hidden, head_weight, head_bias through ``losses``. Not differentiable: levels,
        offsets, the other outputs; no double backward.
    Raises:
        ValueError: shape, range or device.
        TypeError: dtype.
        RuntimeError: a head without elements.
        NotImplementedError: the backend cannot.
    Source: our definition of the degree loss of SPO, arXiv:2409.17791, whose text gives no formula.
    """
    _check(hidden, removal_levels, segment_offsets, head_weight, head_bias, center_views)
    backend = resolve_backend(_OP, backend, hidden)
    refuse_fp64_on_triton(_OP, backend, {"hidden": hidden, "head_weight": head_weight})
    call = _Call(backend=backend, center_views=center_views)
    tensors = (hidden, head_weight, head_bias, removal_levels, segment_offsets)
    return DegreeLossOutput(*_run(call, *tensors))


@dataclasses.dataclass(frozen=True)
class _Call:
    """Non-tensor state of one call."""

    backend: str
    center_views: bool

    def packed(self) -> tuple[list[str], list[float]]:
        return [self.backend, "centered" if self.center_views else "plain"], []

    @classmethod
    def unpacked(cls, words: Sequence[str], numbers: Sequence[float]) -> "_Call":
        return cls(backend=words[0], center_views=words[1] == "centered")


def _forward(
    call: _Call,
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    levels: torch.Tensor,
    segment_offsets: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return the outputs, then level_grad [S, K, H] and head_grad [S, K * H + K]."""
    # autocast would round the products
    with torch.autocast(hidden.device.type, enabled=False):
        return _backend(call.backend).fwd(
            hidden,
            levels,
            segment_offsets,
            head_weight,
            head_bias,
            center_views=call.center_views,
        )


def _like(
    call: _Call,
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    levels: torch.Tensor,
    segment_offsets: torch.Tensor,
) -> list[Like]:
    """Return what the results of ``_forward`` are allocated as."""
    S, (K, H) = segment_offsets.shape[0] - 1, head_weight.shape
    dtype = compute_dtype(hidden, head_weight)
    views = [Like((S,), torch.int32), Like((S,), torch.int32), Like((S, K), torch.bool)]
    return [Like((S,), dtype), *views, Like((S, K, H), dtype), Like((S, K * H + K), dtype)]


def _backward(
    call: _Call,
    grad_losses: torch.Tensor,
    saved: Sequence[torch.Tensor],
    likes: Sequence[Like | None],
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of hidden, head_weight and head_bias."""
    levels, segment_offsets, level_grad, head_grad = saved
    needs_hidden, needs_weight, needs_bias = needs
    backend = _backend(call.backend)
    grad_hidden = grad_weight = grad_bias = None
    if needs_hidden:
        grad_hidden = backend.bwd_hidden(
            levels, segment_offsets, level_grad, grad_losses, dtype=likes[0].dtype
        )
    if needs_weight or needs_bias:
        _, K, H = level_grad.shape
        grad_head = backend.bwd_head(head_grad, grad_losses, dtype=likes[1].dtype)
        grad_weight = grad_head[: K * H].view(K, H) if needs_weight else None
        grad_bias = grad_head[K * H :] if needs_bias else None
    return grad_hidden, grad_weight, grad_bias


_run = loss_op(
    _OP,
    "hidden, head_weight, head_bias?, levels, segment_offsets",
    call_type=_Call,
    differentiable=3,
    outputs=4,
    saved=("levels", "segment_offsets"),
    forward=_forward,
    like=_like,
    backward=_backward,
    # traced, the row counts of a batch would each be a graph of their own
    traced_backends=(),
)


class _Backend(NamedTuple):
    fwd: Callable[..., tuple[torch.Tensor, ...]]
    bwd_hidden: Callable[..., torch.Tensor]
    bwd_head: Callable[..., torch.Tensor]


def _backend(name: str) -> _Backend:
    if name == "triton":
        from spo_kernels.kernels import degree_loss as fwd
        from spo_kernels.kernels import degree_loss_bwd as bwd
    else:
        fwd = bwd = torch_degree_loss
    return _Backend(fwd.degree_loss_fwd, bwd.degree_loss_bwd_hidden, bwd.degree_loss_bwd_head)


def _check(
    hidden: torch.Tensor,
    removal_levels: torch.Tensor,
    segment_offsets: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    center_views: bool,
) -> None:
    named = {
        "hidden": hidden,
        "removal_levels": removal_levels,
        "segment_offsets": segment_offsets,
        "head_weight": head_weight,
    }
    if head_bias is not None:
        named["head_bias"] = head_bias
    for name, tensor in named.items():
        check_tensor(_OP, name, tensor)
    floats = (*FLOAT_DTYPES, torch.float64)
    check_dtype(_OP, "hidden", hidden, floats)
    check_dtype(_OP, "removal_levels", removal_levels, (torch.int8,))
    check_dtype(_OP, "segment_offsets", segment_offsets, (torch.int64,))
    check_dtype(_OP, "head_weight", head_weight, floats)

    check_shape(_OP, "hidden", hidden, (None, None), "[N, H]")
    N, H = hidden.shape
    check_shape(_OP, "removal_levels", removal_levels, (N,), "[N] with N={0}")
    if segment_offsets.dim() != 1 or segment_offsets.numel() == 0:
        fail(_OP, "segment_offsets", "have shape [S + 1]", tuple(segment_offsets.shape))
    if head_weight.numel() == 0 and head_weight.dim() <= 2:
        fail(
            _OP,
            "head_weight",
            f"hold [K, H] elements with H={H}",
            f"0 elements {tuple(head_weight.shape)}",
            way_out="A sharded head must be gathered first (ZeRO-3: GatheredParameters).",
            error=RuntimeError,
        )
    check_shape(_OP, "head_weight", head_weight, (None, H), "[K, H] with H={1}")
    K = head_weight.shape[0]
    if not 2 <= K <= _MAX_DEGREES:
        fail(_OP, "head_weight", f"have 2 to {_MAX_DEGREES} rows (degrees K)", K)
    if head_bias is not None:
        check_dtype(_OP, "head_bias", head_bias, (head_weight.dtype,))
        check_shape(_OP, "head_bias", head_bias, (K,), "[K] with K={0}")
    if not isinstance(center_views, bool):
        fail(_OP, "center_views", "be a bool", type(center_views).__name__, error=TypeError)
    check_same_device(_OP, named)
