"""Public ``preference_loss``: pairwise losses on log-probs, with their gradients."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from spo_kernels.calls.backends import refuse_fp64_on_triton, resolve_backend
from spo_kernels.calls.loss_table import LOSS_TYPES, MAX_BATCH_PAIRS, formula_lines
from spo_kernels.calls.preference_loss import GRAD_ROWS, Form, LossOptions, PairData, Scored, Side
from spo_kernels.calls.preference_loss_checks import check_options, check_sides
from spo_kernels.ops.loss_op import Like, loss_op
from spo_kernels.torch_backend import preference_loss as torch_backend

_OP = "preference_loss"


class PreferenceLossOutput(NamedTuple):
    """Per-pair results, ``[P]`` fp32 each (fp64 for fp64 inputs), differentiable in ``losses``."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor


def preference_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor | None = None,
    ref_rejected_logps: torch.Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: float | None = None,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    alphapo_alpha: float = 0.0,
    ada_rho: float = 0.1,
    ada_tau_min: float = 0.1,
    ada_tau_max: float = 4.0,
    clip_chosen: float = 5.0,
    clip_rejected: float = 5.0,
    rwr_temperature: float = 1.0,
    rwr_max_weight: float = math.inf,
    min_reward_margin: float = 0.0,
    chosen_mask: torch.Tensor | None = None,
    rejected_mask: torch.Tensor | None = None,
    chosen_offsets: torch.Tensor | None = None,
    rejected_offsets: torch.Tensor | None = None,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
    chosen_log_sum_sq_probs: torch.Tensor | None = None,
    rejected_log_sum_sq_probs: torch.Tensor | None = None,
    response_logps: torch.Tensor | None = None,
    ref_response_logps: torch.Tensor | None = None,
    response_mask: torch.Tensor | None = None,
    response_offsets: torch.Tensor | None = None,
    response_lengths: torch.Tensor | None = None,
    pair_weights: torch.Tensor | None = None,
    reward_chosen: torch.Tensor | None = None,
    reward_rejected: torch.Tensor | None = None,
    backend: str = "auto",
) -> PreferenceLossOutput:
    """Compute a weighted mix of preference losses of P pairs.

        pc = sum of chosen's token log-probs       c = pc - the same of the reference
        pr, r: of rejected                         px, x: of a third response
        losses = w sum_i loss_weights[i] * loss_type[i](...)
        chosen_rewards = beta c                    rejected_rewards = beta r
        m = beta (c - r), sp(t) = log(1 + exp(t)), s(t) = 1 / (1 + exp(-t))

    {formulas}

    The token sums, the loss and its gradient come from one kernel launch and the backward is one
    more; all arithmetic is fp32 (fp64 for fp64 inputs), nothing is read back to the host, and
    results are bit-for-bit repeatable. Policy equal to reference gives a margin of exactly 0. Under
    ``torch.compile`` the kernels are one node of the graph, with the bits of an eager call; the
    torch backend is traced and fused.
    ``losses.mean()`` is TRL's batch loss. A mix makes a method: CPO is ``["cpo", "sft"]`` without a
    reference, ORPO ``["orpo", "nll"]``, TPO ``["cpo", "nll"]``, RPO ``["sigmoid", "rpo"]``.

    Log-probs come in one of three forms, for each response on its own: ``[P]``, sums; ``[P, T]``,
    token log-probs with one response a row; ``[B, T]`` with offsets, response p being the tokens
    ``offsets[p]:offsets[p + 1]`` in row-major order (packed batches: ``logps[None]``). A reference
    has the same form or is given as sums.

    Args:
        chosen_logps: ``[P]`` or ``[., T]`` bf16/fp16/fp32 (fp64 on the torch backend), any stride.
        rejected_logps: of the rejected completions, the same dtype.
        ref_chosen_logps, ref_rejected_logps: of the reference model, any float dtype; both or
            neither, None counts as 0.
        loss_type: a name from ``loss_table.LOSS_TYPES`` or a sequence of names to mix. The
            parameters below are the call's: all types of a mix have one beta, as in TRL.
        loss_weights: one finite Python float for each type; None is 1 each.
        beta: > 0. Inverse temperature of the margin.
        label_smoothing: in [0, 0.5). eps of exo_pair (> 0), robust, cpo, simpo, alphapo, aot.
        f_divergence_type: "reverse_kl", "forward_kl" (1 - exp(-c)), "js_divergence"
            (log 2 - sp(-c)) or "alpha_divergence" ((exp((a - 1) c) - 1) / (a - 1)) in place of c
            and r in the types that are a function of their difference (arXiv:2309.16240);
            exponents above 80 count as 80.
        f_alpha_divergence_coef: a of "alpha_divergence".
        ld_alpha: in [0, 1]: weight of the tokens beyond the shorter completion's length in c and r
            (LD-DPO, arXiv:2409.06411); token log-probs only. A reference given as sums is taken to
            be weighted already.
        discopop_tau, simpo_gamma, alphapo_alpha, ada_rho, ada_tau_min, ada_tau_max, clip_chosen,
            clip_rejected, rwr_temperature, rwr_max_weight: see the formulas; ranges in
            ``loss_table.PARAMETERS``.
        min_reward_margin: >= 0: pairs with |reward_chosen - reward_rejected| below it count 0 (they
            stay in P and in batch statistics).
        chosen_mask, rejected_mask: the tokens that count, bool or int in the shape of their
            log-probs; None is all. They also count the lengths.
        chosen_offsets, rejected_offsets: ``[P + 1]`` int64, not decreasing.
        chosen_lengths, rejected_lengths: ``[P]`` int32/int64 completion lengths in tokens, for the
            types with len_c in their formula where no mask counts them; 0 counts as 1 in len_c.
        chosen_log_sum_sq_probs, rejected_log_sum_sq_probs: log sum_v p_v^2 in the form of their
            log-probs or summed: weights each pair by exp(mean over chosen's tokens of (log-prob -
            it) + the same of rejected), without a gradient (WPO, arXiv:2406.11827, Eq. 2).
        response_logps, ref_response_logps, response_mask, response_offsets, response_lengths: the
            third response of ``selm`` and ``nll``.
        pair_weights: ``[P]`` float, the w above; None is 1. A weight of 0 leaves a pair out.
        reward_chosen, reward_rejected: ``[P]`` float scores of a reward model, for ``rwr`` and
            min_reward_margin.
        backend: "auto" (triton on a CUDA tensor, else torch), "torch" or "triton". Types that look
            at the whole batch run as one program on triton, which takes 256 pairs; above that
            "auto" is torch.
    Returns:
        ``PreferenceLossOutput``: ``losses``, ``chosen_rewards``, ``rejected_rewards`` and the
        policy's summed ``chosen_logps``, ``rejected_logps``, each ``[P]`` fp32.
    Gradients: chosen_logps, rejected_logps, response_logps through ``losses``. Not differentiable:
        everything else; no double backward.
    Raises:
        ValueError: shape, range, device or an unknown type.
        TypeError: dtype.
        NotImplementedError: the backend cannot.
    Source: the papers named in ``loss_table.LOSS_TYPES``, one a row, with what differs from them.
    """
    chosen = Side(
        chosen_logps,
        ref_chosen_logps,
        chosen_mask,
        chosen_offsets,
        chosen_lengths,
        chosen_log_sum_sq_probs,
    )
    rejected = Side(
        rejected_logps,
        ref_rejected_logps,
        rejected_mask,
        rejected_offsets,
        rejected_lengths,
        rejected_log_sum_sq_probs,
    )
    response = Side(
        response_logps, ref_response_logps, response_mask, response_offsets, response_lengths
    )
    data = PairData(pair_weights, reward_chosen, reward_rejected)
    options = check_options(
        loss_type=loss_type,
        loss_weights=loss_weights,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        ld_alpha=ld_alpha,
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
        alphapo_alpha=alphapo_alpha,
        ada_rho=ada_rho,
        ada_tau_min=ada_tau_min,
        ada_tau_max=ada_tau_max,
        clip_chosen=clip_chosen,
        clip_rejected=clip_rejected,
        rwr_temperature=rwr_temperature,
        rwr_max_weight=rwr_max_weight,
        min_reward_margin=min_reward_margin,
    )
    check_sides(chosen, rejected, response, data, options)
    backend = _resolve_backend(backend, chosen, options)
    floats = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "response_logps": response_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
        "ref_response_logps": ref_response_logps,
    }
    refuse_fp64_on_triton(_OP, backend, floats)
    has_lengths = chosen_lengths is not None or rejected_lengths is not None
    if has_lengths and not (options.needs_lengths or chosen_log_sum_sq_probs is not None):
        chosen, rejected = chosen._replace(lengths=None), rejected._replace(lengths=None)
    return pair_losses(options, backend, (chosen, rejected, response), data)


def pair_losses(
    options: LossOptions, backend: str, sides: Sequence[Side], data: PairData
) -> PreferenceLossOutput:
    """Run a checked call: chosen, rejected and third responses (``Side(None)`` where none is)."""
    call = _Call(backend, options)
    others = (tensor for side in sides for tensor in side[1:])
    losses, rewards, sums = _run(call, *(side.logps for side in sides), *others, *data)
    return PreferenceLossOutput(losses, *rewards.unbind(), *sums.unbind())


@dataclasses.dataclass(frozen=True)
class _Call:
    """Non-tensor state of one call."""

    backend: str
    options: LossOptions

    def packed(self) -> tuple[list[str], list[float]]:
        words, numbers = self.options.packed()
        return [self.backend, *words], numbers

    @classmethod
    def unpacked(cls, words: Sequence[str], numbers: Sequence[float]) -> "_Call":
        return cls(words[0], LossOptions.unpacked(words[1:], numbers))


_RESPONSES = ("chosen", "rejected", "response")
# fields of a side beside its log-probs
_OTHERS = Side._fields[1:]


def _sides_of(tensors: Sequence[torch.Tensor | None]) -> tuple[Side, Side, Side | None]:
    others = tensors[len(_RESPONSES) :]
    sides = [
        Side(logps, *others[i * len(_OTHERS) : (i + 1) * len(_OTHERS)])
        for i, logps in enumerate(tensors[: len(_RESPONSES)])
    ]
    return sides[0], sides[1], None if sides[2].logps is None else sides[2]


def _forward(call: _Call, *tensors: torch.Tensor | None) -> Scored:
    data = PairData(*tensors[-len(PairData._fields) :])
    backend = loss_backend_of(call.backend)
    return backend.preference_loss_fwd(*_sides_of(tensors), data, call.options)


def _like(call: _Call, *tensors: torch.Tensor | None) -> Scored:
    """Return what the results of ``_forward`` are allocated as."""
    options = call.options
    P, L = _sides_of(tensors)[0].form.pairs, len(options.losses)
    sorts = any(loss.kind == "ranked" for loss in options.losses)
    has_statistic = any(loss.kind == "statistic" for loss in options.losses)
    return Scored(
        losses=Like((P,)),
        rewards=Like((2, P)),
        sums=Like((2, P)),
        grads=Like((len(GRAD_ROWS), P)),
        tails=None if options.ld_alpha is None else Like((2, P), torch.int64),
        ranks=Like((L, 2, P), torch.int32) if sorts else None,
        rank_grads=Like((L, 2, P)) if sorts else None,
        stats=Like((L, 2, P)) if has_statistic else None,
    )


def _backward(
    call: _Call,
    grad_losses: torch.Tensor,
    saved: Sequence[torch.Tensor | None],
    likes: Sequence[Like | None],
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the three responses' log-probs."""
    masks, offsets, kept = saved[:3], saved[3:6], saved[6:]
    forms = tuple(
        None if like is None else Form(*like, mask, places)
        for like, mask, places in zip(likes, masks, offsets, strict=True)
    )
    return loss_backend_of(call.backend).preference_loss_bwd(
        grad_losses, Scored.of_kept(kept), forms, call.options, needs
    )


_run = loss_op(
    _OP,
    ", ".join(
        (
            "chosen_logps, rejected_logps, response_logps?",
            *(f"{which}_{field}?" for which in _RESPONSES for field in _OTHERS),
            *(f"{field}?" for field in PairData._fields),
        )
    ),
    call_type=_Call,
    differentiable=3,
    outputs=3,
    saved=tuple(f"{which}_{field}" for field in ("mask", "offsets") for which in _RESPONSES),
    forward=_forward,
    like=_like,
    backward=_backward,
)


def loss_backend_of(name: str):
    """Return the module that runs the forward and backward of a call."""
    if name == "triton":
        from spo_kernels.kernels import preference_loss

        return preference_loss
    return torch_backend


def _resolve_backend(backend: str, chosen: Side, options: LossOptions) -> str:
    resolved = resolve_backend(_OP, backend, chosen.logps)
    if resolved == "triton" and options.is_batch and chosen.form.pairs > MAX_BATCH_PAIRS:
        if backend == "auto":
            return "torch"
        name = next(loss.name for loss in options.losses if loss.batch)
        raise NotImplementedError(
            f"{_OP}: backend='triton' takes up to {MAX_BATCH_PAIRS} pairs for "
            f"loss_type={name!r}, got {chosen.form.pairs}. Use backend='torch' or "
            "backend='auto'."
        )
    return resolved


if preference_loss.__doc__ is not None:
    preference_loss.__doc__ = preference_loss.__doc__.replace(
        "{formulas}", formula_lines(LOSS_TYPES, indent=8)
    )
