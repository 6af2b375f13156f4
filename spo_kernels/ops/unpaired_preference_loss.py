"""Public ``unpaired_preference_loss``: KTO and its kin on single labelled responses."""

import dataclasses
from collections.abc import Callable, Sequence
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
    UNPAIRED_LOSS_TYPES,
    UNPAIRED_PARAMETERS,
    UnpairedParameters,
)
from spo_kernels.ops.loss_op import Like, loss_op
from spo_kernels.torch_backend import unpaired_preference_loss as torch_backend

_OP = "unpaired_preference_loss"


class UnpairedPreferenceLossOutput(NamedTuple):
    """Per-response results and the two baselines; only ``losses`` is differentiable."""

    losses: torch.Tensor
    rewards: torch.Tensor
    logps: torch.Tensor
    kl: torch.Tensor
    reward_shift: torch.Tensor


def unpaired_preference_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    is_desirable: torch.Tensor,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl_logps: torch.Tensor | None = None,
    ref_kl_logps: torch.Tensor | None = None,
    kl: torch.Tensor | None = None,
    reward_shift: torch.Tensor | None = None,
    segment_offsets: torch.Tensor | None = None,
    backend: str = "auto",
) -> UnpairedPreferenceLossOutput:
    """Compute the loss of S responses, each labelled good or bad on its own.

        d = logps - ref_logps                      rewards = beta * d
        losses = weight * loss_type(d),            weight: desirable_weight or undesirable_weight
        kto: s(beta (z - d)) if desirable, else s(beta (d - z)),
             z = max(0, mean(kl_logps - ref_kl_logps)), no gradient through z
        apo_zero_unpaired: s(-beta d) if desirable, else s(beta d)
        bco: sp(-(beta d - reward_shift)) if desirable, else sp(beta d - reward_shift), no gradient
             through reward_shift

    The tokens of a response are summed inside the kernel that computes loss and gradient, one
    launch (two for bco on tokens without a given shift); z is computed there too. The backward is
    one multiply or one launch. All arithmetic is fp32 (fp64 for fp64 inputs), nothing is read back
    to the host, and results are bit-for-bit repeatable (torch backend with offsets on a GPU: under
    ``torch.use_deterministic_algorithms``). A policy equal to its reference token by token gives d
    of exactly 0. Under ``torch.compile`` the kernels are one node of the graph, with the bits of an
    eager call; the torch backend is traced and fused.

    Args:
        logps: bf16/fp16/fp32 (fp64 on the torch backend), any stride: ``[S]`` sums of whole
            completions, or ``[S, T]`` token log-probs, or with ``segment_offsets`` tokens of any
            1-D or 2-D shape, read row by row. Tokens that do not count must read 0.
        ref_logps: of the reference model, any float dtype: tokens in logps's shape, or ``[S]``
            sums; None counts as 0.
        is_desirable: ``[S]`` bool.
        loss_type: a name from ``loss_table.UNPAIRED_LOSS_TYPES``.
        beta: > 0. Inverse temperature of the score.
        desirable_weight, undesirable_weight: >= 0.
        kl_logps, ref_kl_logps: ``[M]`` each, any M, any float dtype, sums of mismatched
            completions: kto estimates z from them. No response at all counts as z = 0.
        kl: ``[]`` instead of the two, the mean over all ranks; below 0 it counts as 0. kto needs
            one of the two ways, the other types take neither.
        reward_shift: ``[]`` for bco, the caller's running mean of rewards. None takes this batch's:
            the mean of the two sides' mean rewards; a side without responses is left out.
        segment_offsets: ``[S + 1]`` int64, not decreasing; response s is tokens
            ``offsets[s]:offsets[s + 1]`` and may be empty. Offsets outside the tokens are clamped.
        backend: "auto" (triton on a CUDA tensor, else torch), "torch" or "triton".
    Returns:
        ``UnpairedPreferenceLossOutput``, fp32: ``losses``, ``rewards`` and ``logps`` (the sums)
        ``[S]``, ``kl`` ``[]``, the z of kto, else 0, ``reward_shift`` ``[]``, that of bco, else 0.
    Gradients: logps through ``losses``, in its shape and dtype: each token has its response's
        gradient, tokens outside every segment have 0. Not differentiable: everything else; no
        double backward.
    Raises:
        ValueError: shape, range, device or an unknown type.
        TypeError: dtype.
        NotImplementedError: the backend cannot.
    Source: kto: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7, as in TRL. apo_zero_unpaired:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7. bco: Jung et al. 2024,
        arXiv:2404.04656, without its density-ratio weights.
    """
    check_choice(_OP, "loss_type", loss_type, (row.name for row in UNPAIRED_LOSS_TYPES))
    values = {
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    parameters = UnpairedParameters(**check_parameters(_OP, values, UNPAIRED_PARAMETERS))
    floats = {
        "logps": logps,
        "ref_logps": ref_logps,
        "kl_logps": kl_logps,
        "ref_kl_logps": ref_kl_logps,
        "kl": kl,
        "reward_shift": reward_shift,
    }
    _check_baseline(loss_type, floats)
    _check_tensors(floats, is_desirable, segment_offsets)
    backend = resolve_backend(_OP, backend, logps)
    refuse_fp64_on_triton(_OP, backend, floats)
    has_tokens = logps.dim() == 2 or segment_offsets is not None
    call = _Call(
        backend=backend,
        loss_type=loss_type,
        parameters=parameters,
        ref_has_tokens=has_tokens and ref_logps is not None and ref_logps.shape == logps.shape,
    )
    *outputs, baselines = _run(
        call,
        logps,
        ref_logps,
        is_desirable,
        segment_offsets,
        kl_logps,
        ref_kl_logps,
        kl if loss_type == "kto" else reward_shift,
    )
    return UnpairedPreferenceLossOutput(*outputs, kl=baselines[0], reward_shift=baselines[1])


@dataclasses.dataclass(frozen=True)
class _Call:
    """Non-tensor state of one call."""

    backend: str
    loss_type: str
    parameters: UnpairedParameters
    ref_has_tokens: bool

    def packed(self) -> tuple[list[str], list[float]]:
        ref = "tokens" if self.ref_has_tokens else "sums"
        return [self.backend, self.loss_type, ref], [*self.parameters]

    @classmethod
    def unpacked(cls, words: Sequence[str], numbers: Sequence[float]) -> "_Call":
        backend, loss_type, ref = words
        return cls(backend, loss_type, UnpairedParameters(*numbers), ref == "tokens")


def _forward(
    call: _Call,
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    is_desirable: torch.Tensor,
    segment_offsets: torch.Tensor | None,
    *samples: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Return losses, rewards, sums and baselines, then grads [S].

    ``samples`` are kl_logps, ref_kl_logps and the baseline.
    """
    losses, grads, rewards, sums, baselines = _backend(call.backend).fwd(
        logps,
        ref_logps,
        is_desirable,
        segment_offsets,
        *samples,
        ref_has_tokens=call.ref_has_tokens,
        loss_type=call.loss_type,
        parameters=call.parameters,
    )
    return losses, rewards, sums, baselines, grads


def _like(
    call: _Call,
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    is_desirable: torch.Tensor,
    *others: torch.Tensor | None,
) -> tuple[Like, ...]:
    """Return what the results of ``_forward`` are allocated as."""
    each = Like(is_desirable.shape)
    return each, each, each, Like((2,)), each


def _backward(
    call: _Call,
    grad_losses: torch.Tensor,
    saved: Sequence[torch.Tensor | None],
    likes: Sequence[Like],
    needs: Sequence[bool],
) -> tuple[torch.Tensor]:
    """Return the gradient of logps."""
    segment_offsets, grads = saved
    shape, dtype = likes[0]
    if segment_offsets is not None:
        grad_logps = _backend(call.backend).bwd_tokens(
            grads, grad_losses, segment_offsets, tokens=shape.numel(), dtype=dtype
        )
        return (grad_logps.view(shape),)
    grad_logps = (grads * grad_losses).to(dtype)
    return (grad_logps[:, None].expand(shape) if len(shape) == 2 else grad_logps,)


_run = loss_op(
    _OP,
    "logps, ref_logps?, is_desirable, segment_offsets?, kl_logps?, ref_kl_logps?, baseline?",
    call_type=_Call,
    differentiable=1,
    outputs=4,
    saved=("segment_offsets",),
    forward=_forward,
    like=_like,
    backward=_backward,
)


class _Backend(NamedTuple):
    fwd: Callable[..., tuple[torch.Tensor, ...]]
    bwd_tokens: Callable[..., torch.Tensor]


def _backend(name: str) -> _Backend:
    if name == "triton":
        from spo_kernels.kernels import unpaired_preference_loss as fwd
        from spo_kernels.kernels import unpaired_preference_loss_bwd as bwd
    else:
        fwd = bwd = torch_backend
    return _Backend(fwd.unpaired_preference_loss_fwd, bwd.unpaired_preference_loss_bwd_tokens)


def _check_baseline(loss_type: str, floats: dict[str, torch.Tensor | None]) -> None:
    """Refuse a baseline that the type does not have, two of them, or none where one is needed."""
    if loss_type != "kto":
        for name in ("kl_logps", "ref_kl_logps", "kl"):
            if floats[name] is not None:
                fail(_OP, name, f"be None for loss_type={loss_type!r}", "a value")
    if loss_type != "bco" and floats["reward_shift"] is not None:
        fail(_OP, "reward_shift", f"be None for loss_type={loss_type!r}", "a value")
    if loss_type == "kto":
        samples = {name: floats[name] for name in ("kl_logps", "ref_kl_logps")}
        given = [name for name, value in samples.items() if value is not None]
        if floats["kl"] is not None and given:
            fail(_OP, "kl", f"be None where {given[0]} is given", "a value")
        if floats["kl"] is None and len(given) < 2:
            missing = next(name for name in samples if name not in given)
            fail(
                _OP,
                missing,
                "be given for loss_type='kto'",
                None,
                way_out="Pass kl_logps and ref_kl_logps, or their mean over all ranks as kl.",
            )


def _check_tensors(
    floats: dict[str, torch.Tensor | None],
    is_desirable: torch.Tensor,
    segment_offsets: torch.Tensor | None,
) -> None:
    """Refuse tensors that do not form S responses."""
    named = {name: t for name, t in floats.items() if t is not None or name == "logps"}
    for name, tensor in named.items():
        check_tensor(_OP, name, tensor)
        check_dtype(_OP, name, tensor, (*FLOAT_DTYPES, torch.float64))
    check_tensor(_OP, "is_desirable", is_desirable)
    check_dtype(_OP, "is_desirable", is_desirable, (torch.bool,))
    check_shape(_OP, "is_desirable", is_desirable, (None,), "[S]")
    S = is_desirable.numel()

    logps, ref_logps = floats["logps"], floats["ref_logps"]
    if segment_offsets is not None:
        check_tensor(_OP, "segment_offsets", segment_offsets)
        check_dtype(_OP, "segment_offsets", segment_offsets, (torch.int64,))
        if segment_offsets.shape != (S + 1,):
            requirement = f"have shape [S + 1] with S={S} like is_desirable"
            fail(_OP, "segment_offsets", requirement, tuple(segment_offsets.shape))
        if logps.dim() not in (1, 2):
            fail(_OP, "logps", "have shape [N] or [B, T] with segment_offsets", tuple(logps.shape))
    elif logps.dim() not in (1, 2) or logps.shape[0] != S:
        got = tuple(logps.shape)
        way_out = "" if logps.dim() != 2 else "Flat tokens need segment_offsets."
        requirement = f"have shape [S] or [S, T] with S={S} like is_desirable"
        fail(_OP, "logps", requirement, got, way_out=way_out)
    if ref_logps is not None and ref_logps.shape not in (logps.shape, (S,)):
        got = tuple(ref_logps.shape)
        fail(_OP, "ref_logps", f"have shape {tuple(logps.shape)} like logps or [S]", got)
    if floats["kl_logps"] is not None:
        check_shape(_OP, "kl_logps", floats["kl_logps"], (None,), "[M]")
        M = floats["kl_logps"].numel()
        text = "[M] with M={0} like kl_logps"
        check_shape(_OP, "ref_kl_logps", floats["ref_kl_logps"], (M,), text)
    for name in ("kl", "reward_shift"):
        if floats[name] is not None:
            check_shape(_OP, name, floats[name], (), "[]")

    named["is_desirable"] = is_desirable
    if segment_offsets is not None:
        named["segment_offsets"] = segment_offsets
    check_same_device(_OP, named)
