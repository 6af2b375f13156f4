"""Naive eager ``linear_logprob``: the full logits, the oracle of the tests and the spec.

    z0 = hidden W^T + bias + a_out b^T            raw logits                       [N, V]
    z  = cap(z0 * logit_scale) / temperature      cap(x) = softcap tanh(x / softcap)
    logsumexp        = log sum_v exp(z_v)
    logps            = z_label - logsumexp
    entropy          = logsumexp - sum_v p_v z_v             p = softmax(z)
    mean_logits      = mean_v z_v
    is_top1          = label is the first maximum of z
    log_sum_sq_probs = log sum_v p_v^2

Any float dtype, differentiable by autograd (``log_sum_sq_probs`` is detached like the op's); never
used by a backend.
"""

import torch


def linear_logprob_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> dict[str, torch.Tensor]:
    """Return every output of ``linear_logprob`` by name, in the labels' shape."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if lora is not None:
        a_out, b = lora
        logits = logits + a_out @ b.T
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature

    scored = labels != ignore_index
    target = torch.where(scored, labels, 0).unsqueeze(-1)
    logsumexp = torch.logsumexp(logits, dim=-1)
    target_logit = logits.gather(-1, target).squeeze(-1)
    probs = torch.softmax(logits, dim=-1)
    # a -inf logit has probability 0 and contributes nothing
    finite_logits = torch.where(probs == 0, 0.0, logits)
    outputs = {
        "logps": target_logit - logsumexp,
        "entropy": logsumexp - (probs * finite_logits).sum(-1),
        "logsumexp": logsumexp,
        "mean_logits": logits.mean(-1),
        "log_sum_sq_probs": torch.log((probs * probs).sum(-1)).detach(),
    }
    outputs = {name: torch.where(scored, value, 0.0) for name, value in outputs.items()}
    is_top1 = logits.argmax(-1) == target.squeeze(-1)
    outputs["is_top1"] = is_top1 & scored
    return outputs
