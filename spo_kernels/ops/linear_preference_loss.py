"""Public ``linear_preference_loss``: a preference loss straight from hidden states and LM head."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from spo_kernels.calls.backends import refuse_fp64_on_triton, resolve_backend
from spo_kernels.calls.checks import check_choice, refuse_double_backward
from spo_kernels.calls.linear_logprob import Call, Inputs, Rows, Settings
from spo_kernels.calls.linear_logprob_checks import check_head_inputs, check_transform
from spo_kernels.calls.loss_table import MAX_BATCH_PAIRS
from spo_kernels.calls.plan import GRAD_INPUTS, PAIR_STRATEGIES
from spo_kernels.calls.preference_loss import PairData
from spo_kernels.calls.preference_loss_checks import check_options, check_sides
from spo_kernels.ops.linear_logprob import score_rows, score_without_host
from spo_kernels.ops.linear_logprob_call import needed_grads, planned_device, sizes_of
from spo_kernels.ops.linear_logprob_rows import rows_of
from spo_kernels.ops.linear_preference_loss_batch import (
    check_batch,
    count_batch,
    merged_labels,
    sides_of,
)
from spo_kernels.ops.linear_preference_loss_pairwise import (
    ROW_INPUTS,
    PairTensors,
    PairwiseCall,
    pairwise_forward,
    scaled_gradient,
)
from spo_kernels.ops.preference_loss import pair_losses
from spo_kernels.planner.linear_preference_loss import pair_groups, plan_pairs

_OP = "linear_preference_loss"


class LinearPreferenceLossOutput(NamedTuple):
    """The mean loss, differentiable, and per-pair results ``[P]`` without a gradient."""

    loss: torch.Tensor
    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor


def linear_preference_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ref_logps: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
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
    response_labels: torch.Tensor | None = None,
    pair_weights: torch.Tensor | None = None,
    reward_chosen: torch.Tensor | None = None,
    reward_rejected: torch.Tensor | None = None,
    budget_bytes: int | None = None,
    strategy: str = "auto",
    backend: str = "auto",
) -> LinearPreferenceLossOutput:
    """Compute the mean preference loss of P pairs from hidden states and the LM head.

        logps = linear_logprob(hidden, weight, labels)           [B, T]
        loss  = mean(preference_loss(chosen, rejected, ...))     rows p and P + p of the batch

    The ``[N, V]`` logits are never stored or rounded. Because the loss is known inside the op, the
    gradient of a trainable head takes three products for any number of rows (``pairwise``): groups
    of pairs are scored, and their exponentials become gradients, one after the other, inside the
    byte budget. ``plan_linear_preference_loss`` chooses between that and the strategies of
    ``linear_logprob``; values and gradients are the same to rounding. Sums over groups are fp32,
    the upstream gradient multiplies them on the device. Results are bit-for-bit repeatable.
    Under ``torch.compile`` no counts can be read on the host, so ``pairwise`` is refused and the
    call is ``linear_logprob`` and ``preference_loss``: every row is scored, ignored ones as zeros,
    and the budget is that of ``linear_logprob``.

    Args:
        hidden: ``[B, T, H]`` bf16/fp16/fp32 (fp64 on the torch backend), any strides. B = 2 P: the
            chosen completions, then the rejected ones in the same order; B = 3 P where a loss type
            reads a third response, which comes last.
        weight, bias, lora, temperature, logit_scale, softcap: the head, as in ``linear_logprob``.
        labels: ``[B, T]`` int64/int32 aligned with hidden (already shifted), in [0, V) or
            ``ignore_index``: prompt and padding.
        ref_logps: log-probs of the reference model for the same labels, any float dtype: ``[B]``
            sums or ``[B, T]`` tokens (``linear_logprob`` of its hidden states). None is 0.
        loss_type, loss_weights, beta, label_smoothing, f_divergence_type, f_alpha_divergence_coef,
            ld_alpha, discopop_tau, simpo_gamma, alphapo_alpha, ada_rho, ada_tau_min, ada_tau_max,
            clip_chosen, clip_rejected, rwr_temperature, rwr_max_weight, min_reward_margin,
            pair_weights, reward_chosen, reward_rejected: as in ``preference_loss``.
        response_labels: ``[P, T]`` labels of the ``nll`` term on the chosen rows, in place of a
            third role in the batch: ORPO's, which hold the prompt too. Where ``labels`` has a
            target as well it must be the same one.
        budget_bytes: workspace the call may use; default: as in ``linear_logprob`` with 1 GiB
            (256 MiB on cpu) in place of its 256 MiB (64 MiB).
        strategy: "auto" (the planner's choice), "pairwise", "score", "direction", "resident" or
            "recompute".
        backend: "auto" (triton on a CUDA tensor, else torch), "torch" or "triton". The loss itself
            is torch's for types that look at the whole batch and more than 256 pairs.
    Returns:
        ``LinearPreferenceLossOutput``: ``loss`` ``[]`` and, ``[P]`` each, ``losses``,
        ``chosen_rewards``, ``rejected_rewards``, ``chosen_logps``, ``rejected_logps``; fp32 (fp64
        for fp64 hidden states).
    Gradients: hidden, weight, bias, a_out, b through ``loss``. Not differentiable: everything else;
        no double backward.
    Raises:
        ValueError: shape, range, device or budget.
        TypeError: dtype.
        IndexError: a label outside [0, V).
        RuntimeError: an empty, sharded weight; double backward.
        NotImplementedError: a strategy or backend that cannot.
    Source: computing a loss's gradient while its logits live as in Hsu et al. 2024 (Liger),
        arXiv:2410.10989. Differs from it by: log-probs in fp32, sums over groups in fp32, any loss
        type, no vocabulary-sized tile outside the budget.
    """
    compute_dtype = check_head_inputs(_OP, hidden, weight, labels, bias, lora)
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
    data = PairData(pair_weights, reward_chosen, reward_rejected)
    roles = check_batch(_OP, hidden, labels, ref_logps, response_labels, options)
    P = labels.shape[0] // roles
    scored = labels != ignore_index
    # stand-ins without memory: the checks read shapes, dtypes and devices of what the loss gets
    shadow = hidden.new_zeros((), dtype=torch.float32).expand(labels.shape)
    sides = sides_of(shadow, scored, ref_logps, response_labels, roles, ignore_index)
    check_sides(*sides, data, options)
    temperature, logit_scale, softcap = check_transform(_OP, temperature, logit_scale, softcap)
    check_choice(_OP, "strategy", strategy, ("auto", *PAIR_STRATEGIES))
    backend = resolve_backend(_OP, backend, hidden)
    # a kernel holds so many coupled pairs; the answer must not depend on the plan
    is_too_wide = options.is_batch and P > MAX_BATCH_PAIRS
    loss_backend = "torch" if is_too_wide else backend
    refuse_fp64_on_triton(_OP, backend, {"hidden": compute_dtype, "ref_logps": ref_logps})
    in_graph = torch.compiler.is_compiling()
    if in_graph and strategy == "pairwise":
        raise NotImplementedError(
            f"{_OP}: strategy must be 'auto' or one of linear_logprob's under torch.compile, since "
            "pairs are grouped by counts read on the host, got 'pairwise'."
        )

    lora_a, lora_b = lora if lora is not None else (None, None)
    tensors = (hidden, weight, bias, lora_a, lora_b)
    settings = Settings(
        backend=backend,
        compute_dtype=compute_dtype,
        needs_grad=needed_grads(tensors),
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        strategy=strategy,
        budget_bytes=budget_bytes,
    )

    def losses_of(logps: torch.Tensor) -> LinearPreferenceLossOutput:
        sides = sides_of(logps, scored, ref_logps, response_labels, roles, ignore_index)
        out = pair_losses(options, loss_backend, sides, data)
        # a reference in fp64 would raise the outputs' dtype here alone
        found = [value.to(logps.dtype) for value in out]
        return LinearPreferenceLossOutput(found[0].sum() / max(P, 1), found[0].detach(), *found[1:])

    if in_graph:
        # no counts: every row is scored, within the budget of linear_logprob
        to_score = merged_labels(labels, response_labels, ignore_index)
        return losses_of(
            score_without_host(_OP, settings, tensors, to_score, ignore_index, None)[0]
        )

    batch = count_batch(_OP, labels, response_labels, roles, ignore_index, weight.shape[0])
    rows, row_labels = rows_of(hidden, batch.labels, batch.scored, sum(map(sum, batch.pair_rows)))
    plan = plan_pairs(
        sizes_of(settings, rows, tensors),
        batch.pair_rows,
        positions=labels.numel(),
        is_pairwise=not options.couples_pairs,
        is_streamable=ld_alpha is None and response_labels is None,
        is_margin=options.of_margin,
        budget_bytes=budget_bytes,
        # of no pairs nothing is grouped
        strategy=strategy if P else "auto",
        device=planned_device(backend, hidden.device),
    )
    if plan.strategy != "pairwise":
        return losses_of(score_rows(Call(settings, plan), tensors, row_labels, rows)[0])

    has_tokens = ref_logps is not None and ref_logps.dim() == 2
    masks = None, None
    if response_labels is not None:
        none = torch.zeros_like(scored[P:])
        wanted = torch.cat([response_labels != ignore_index, none])
        masks = rows.take_all(scored), rows.take_all(wanted)
    pairwise = PairwiseCall(
        # each group is scored as `resident` does it
        call=Call(settings, dataclasses.replace(plan, strategy="resident")),
        options=options,
        loss_backend=loss_backend,
        groups=tuple(pair_groups(batch.pair_rows, plan.group_rows)),
        pair_rows=batch.pair_rows,
        pair_tokens=batch.pair_tokens,
    )
    pair_tensors = PairTensors(
        row_counts=batch.row_counts,
        token_counts=batch.token_counts,
        ref_sums=None if ref_logps is None or has_tokens else ref_logps.view(roles, P),
        ref_rows=rows.take_all(ref_logps) if has_tokens else None,
        chosen_mask=masks[0],
        response_mask=masks[1],
        data=data,
    )
    out = _LinearPreferenceLossFunction.apply(*tensors, row_labels, rows, pairwise, pair_tensors)
    return LinearPreferenceLossOutput(*out)


class _LinearPreferenceLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor | None,
        lora_b: torch.Tensor | None,
        labels: torch.Tensor,
        rows: Rows,
        pairwise: PairwiseCall,
        tensors: PairTensors,
    ):
        inputs = Inputs(hidden, weight, bias, lora_a, lora_b, labels)
        # autocast would round the fp32 products of the tiles
        with torch.autocast(hidden.device.type, enabled=False):
            result = pairwise_forward(pairwise, rows, inputs, tensors)
        ctx.row_chunk, ctx.rows = pairwise.call.plan.row_chunk, result.rows
        ctx.like = {
            name: (getattr(inputs, name).shape, getattr(inputs, name).dtype)
            for name in result.grads
        }
        ctx.save_for_backward(*result.grads.values())
        out = (
            result.losses.mean(),
            result.losses,
            *result.rewards.unbind(),
            *result.sums.unbind(),
        )
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor | None):
        refuse_double_backward(_OP)
        need = [
            name
            for name, needed in zip(GRAD_INPUTS, ctx.needs_input_grad, strict=False)
            if needed and name in ctx.like
        ]
        kept = dict(zip(ctx.like, ctx.saved_tensors, strict=True))
        grads = {
            name: scaled_gradient(
                kept[name],
                grad_loss,
                *ctx.like[name],
                rows=ctx.rows if name in ROW_INPUTS else None,
                row_chunk=ctx.row_chunk,
            )
            for name in need
        }
        return (*(grads.get(name) for name in GRAD_INPUTS), None, None, None, None)
