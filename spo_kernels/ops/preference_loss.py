"""Public ``preference_loss``: pairwise losses on log-probs, with their gradients."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from spo_kernels.calls.backends import refuse_fp64_on_triton, resolve_backend
from spo_kernels.calls.checks import refuse_double_backward
from spo_kernels.calls.loss_table import LOSS_TYPES, MAX_BATCH_PAIRS, formula_lines
from spo_kernels.calls.preference_loss import PairCall, PairData, Scored, Side
from spo_kernels.calls.preference_loss_checks import check_call, check_mix, check_sides
from spo_kernels.ops.graph.preference_loss import preference_loss_in_graph
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
        loss_type: a name from ``loss_table.LOSS_TYPES`` or a sequence of names to mix.
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
    Raises: ValueError (shape, range, device, unknown type), TypeError (dtype), NotImplementedError
        (backend cannot).
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
    losses, weights = check_mix(loss_type, loss_weights)
    parameters = {
        "beta": beta,
        "label_smoothing": label_smoothing,
        "discopop_tau": discopop_tau,
        "simpo_gamma": simpo_gamma,
        "alphapo_alpha": alphapo_alpha,
        "ada_rho": ada_rho,
        "ada_tau_min": ada_tau_min,
        "ada_tau_max": ada_tau_max,
        "clip_chosen": clip_chosen,
        "clip_rejected": clip_rejected,
        "rwr_temperature": rwr_temperature,
        "rwr_max_weight": rwr_max_weight,
        "min_reward_margin": min_reward_margin,
    }
    call = check_call(
        losses, weights, parameters, f_divergence_type, f_alpha_divergence_coef, ld_alpha
    )
    check_sides(chosen, rejected, response, data, call)
    call = dataclasses.replace(call, backend=_resolve_backend(backend, chosen, call))
    floats = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "response_logps": response_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
        "ref_response_logps": ref_response_logps,
    }
    refuse_fp64_on_triton(_OP, call.backend, floats)
    has_lengths = chosen_lengths is not None or rejected_lengths is not None
    if has_lengths and not (call.needs_lengths or chosen_log_sum_sq_probs is not None):
        chosen, rejected = chosen._replace(lengths=None), rejected._replace(lengths=None)
    if call.backend == "triton" and torch.compiler.is_compiling():
        losses, rewards, sums = preference_loss_in_graph(chosen, rejected, response, data, call)
        return PreferenceLossOutput(losses, *rewards, *sums)
    return PreferenceLossOutput(
        *_PreferenceLossFunction.apply(
            chosen_logps, rejected_logps, response_logps, chosen, rejected, response, data, call
        )
    )


class _PreferenceLossFunction(torch.autograd.Function):
    # what has a gradient stands alone, and once more in its side
    @staticmethod
    def forward(
        ctx: Any,
        chosen_logps: torch.Tensor,
        rejected_logps: torch.Tensor,
        response_logps: torch.Tensor | None,
        chosen: Side,
        rejected: Side,
        response: Side,
        data: PairData,
        call: PairCall,
    ):
        ctx.set_materialize_grads(False)
        sides = (chosen, rejected, None if response_logps is None else response)
        scored = loss_backend_of(call.backend).preference_loss_fwd(*sides, data, call)
        outputs = (scored.losses, *scored.rewards, *scored.sums)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.call, ctx.forms = call, tuple(None if side is None else side.form for side in sides)
        ctx.save_for_backward(*scored.kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor | None, *_: None):
        refuse_double_backward(_OP)
        others = (None,) * 5
        if grad_losses is None:
            return (None, None, None, *others)
        scored = Scored.of_kept(ctx.saved_tensors)
        grads = loss_backend_of(ctx.call.backend).preference_loss_bwd(
            grad_losses, scored, ctx.forms, ctx.call, ctx.needs_input_grad[:3]
        )
        return (*grads, *others)


def loss_backend_of(name: str):
    """Return the module that runs the forward and backward of a call."""
    if name == "triton":
        from spo_kernels.kernels import preference_loss

        return preference_loss
    return torch_backend


def _resolve_backend(backend: str, chosen: Side, call: PairCall) -> str:
    resolved = resolve_backend(_OP, backend, chosen.logps)
    if resolved == "triton" and call.is_batch and chosen.form.pairs > MAX_BATCH_PAIRS:
        if backend == "auto":
            return "torch"
        name = next(loss.name for loss in call.losses if loss.batch)
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
