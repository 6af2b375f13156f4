"""The maths of ``linear_logprob``'s backward that both backends share."""

from collections.abc import Mapping

import torch

from spo_kernels.calls.linear_logprob import Call, Inputs, Kept, RowCoefficients, RowGrads, Rows


def row_coefficients(call: Call, kept: Kept, grads: RowGrads, vocab_size: int) -> RowCoefficients:
    """Return what the upstream gradients ask of every entry and of the label's."""
    logps = kept.target_logit - kept.logsumexp
    zero = torch.zeros_like(logps)
    g_logps = zero if grads.logps is None else grads.logps
    g_lse = zero if grads.logsumexp is None else grads.logsumexp
    probs = kept.label_probs()
    label = g_logps * kept.rest + g_lse * probs
    everywhere = None
    if grads.entropy is not None:
        # a label of probability 0 has no part in an entropy
        term = torch.where(probs == 0, 0.0, probs * (logps + kept.entropy))
        label = label - grads.entropy * term
    if grads.mean_logits is not None:
        everywhere = grads.mean_logits / call.whole_vocab(vocab_size)
        label = label + everywhere
    return RowCoefficients(
        on_p=g_lse - g_logps,
        on_label=label * call.settings.target_slope(kept.target_logit),
        g_entropy=grads.entropy,
        entropy=kept.entropy if grads.entropy is not None else None,
        everywhere=everywhere,
    )


def backward_direction(
    call: Call,
    rows: Rows,
    inputs: Inputs,
    kept: Kept,
    grads: RowGrads,
    need: frozenset[str],
    into: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return grad_hidden / grad_lora_a as a row scale of the kept directions.

        grad_h = (g_logps - g_lse) D + g_lse f_y W[y] + g_mean f mean_v W_v

    The second term is d logsumexp / dh = f_y W[y] - D; the last holds without a softcap. A rank of
    a group keeps ``D_r = -f sum_{v != y} p_v W_v`` of its slice's own softmax instead:
    ``D = share D_r + rest f_y W[y]``, the last term where its slice has the label.
    """
    pairs = [("hidden", inputs.hidden, kept.direction, inputs.weight)]
    pairs.append(("lora_a", inputs.lora_a, kept.direction_lora, inputs.lora_b))
    upstream = torch.zeros_like(kept.logsumexp)
    if grads.logps is not None:
        upstream = upstream + grads.logps
    if grads.logsumexp is not None:
        upstream = upstream - grads.logsumexp
    on_label, labels = grads.logsumexp, inputs.labels
    if call.shard is not None:
        # g_lse p_y + g_logps (1 - p_y), from the whole head's softmax
        terms = ((grads.logps, kept.rest), (grads.logsumexp, kept.label_probs()))
        present = (grad * factor for grad, factor in terms if grad is not None)
        on_label = sum(present, torch.zeros_like(upstream))
        on_label = on_label.where(inputs.owns_label(), 0.0)
        labels = labels.clamp(0, inputs.weight.shape[0] - 1)
        upstream = upstream * kept.share
    out = {}
    for i, (name, tensor, direction, head) in enumerate(pairs):
        if name not in need:
            continue
        scale = upstream if kept.direction_scale is None else upstream * kept.direction_scale[i]
        if name not in into:
            out[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        mean_row = None
        if grads.mean_logits is not None:
            scale_mean = call.settings.slope / call.whole_vocab(head.shape[0])
            mean_row = head.sum(0, dtype=kept.logsumexp.dtype) * scale_mean
        for start in range(0, rows.count, call.plan.row_chunk):
            chunk = slice(start, min(start + call.plan.row_chunk, rows.count))
            value = direction[chunk] * scale[chunk, None]
            if call.shard is not None:
                # a slice whose logits are all -inf has no softmax of its own
                value = value.where(kept.share[chunk, None] != 0, 0.0)
            if on_label is not None:
                slope = call.settings.target_slope(kept.target_logit[chunk])
                label_row = head[labels[chunk]].to(call.settings.compute_dtype).to(value.dtype)
                value = value + (on_label[chunk] * slope)[:, None] * label_row
            if mean_row is not None:
                value = value + grads.mean_logits[chunk, None] * mean_row
            if name in into:
                into[name][chunk] = value
            else:
                rows.put(out[name], chunk.start, chunk.stop, value)
    return out
