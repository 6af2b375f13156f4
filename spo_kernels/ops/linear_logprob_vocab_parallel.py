"""Vocab-parallel ``linear_logprob``: ranks with a slice of the head each exchange row statistics.

    q_r       = exp(logsumexp_r - logsumexp)                     rank r's share of the softmax
    logsumexp = log(sum_r q'_r rest_r + exp(z_y))                q' before it is normalised
    entropy   = sum_r q_r (entropy_r - log q_r)

One gather of row statistics in the forward and one sum of grad_hidden in the backward, whatever
the rows are cut into: ranks that chunk differently cannot wait for each other.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from spo_kernels.calls.checks import fail
from spo_kernels.calls.linear_logprob import Call, Inputs, Kept, RowGrads, Rows, Shard


def shard_of(
    op: str, group: dist.ProcessGroup, weight: torch.Tensor, labels: torch.Tensor
) -> Shard:
    """Return where this rank's rows of the head are; the slices follow each other by rank."""
    if not isinstance(group, dist.ProcessGroup):
        fail(
            op,
            "group",
            "be a torch.distributed.ProcessGroup that this process is in, or None",
            type(group).__name__,
            error=TypeError,
        )
    flat = labels.reshape(-1).long()
    places = torch.arange(1, flat.numel() + 1, device=flat.device)
    # filled and not copied from the host, which would wait for the device
    facts = [flat.new_full((), weight.shape[0]), flat.new_full((), flat.numel())]
    every = _gather(torch.stack([*facts, (flat * places).sum()]), group)
    sizes = every[:, 0]
    return Shard(
        group,
        start=sizes[: group.rank()].sum(),
        total=sizes.sum(),
        differs=(every[:, 1:] != every[0, 1:]).any(),
    )


def combine(
    call: Call, inputs: Inputs, values: dict[str, torch.Tensor], kept: Kept
) -> tuple[dict[str, torch.Tensor], Kept]:
    """Return the row outputs and kept statistics of the whole vocabulary, equal on every rank.

    ``inputs.labels`` are relative to this rank's slice, ``values`` and ``kept`` are of the slice:
    a label of another rank counts there as a logit of -inf.
    """
    mine = {
        "logsumexp": kept.logsumexp,
        "rest": kept.rest,
        "target": kept.target_logit,
        "owns": inputs.owns_label(),
    }
    # in one order on every rank
    for name in ("entropy", "log_sum_sq_probs", "is_top1"):
        if name in call.settings.outputs:
            mine[name] = values[name]
    if "mean_logits" in call.settings.outputs:
        mine["sum"] = values["mean_logits"] * inputs.weight.shape[0]
    if "is_top1" in call.settings.outputs:
        mine["row_max"] = values["row_max"]
    dtype = kept.logsumexp.dtype
    stacked = torch.stack([value.to(dtype) for value in mine.values()])
    # [R, N] each; fp64, so that joining the ranks adds no rounding but the last
    gathered = _gather(stacked, call.shard.group).double()
    every = dict(zip(mine, gathered.unbind(1), strict=True))

    owns = every["owns"] > 0
    # a label that no rank owns reads NaN
    target = every["target"].where(owns, -torch.inf).amax(0)
    target = target.where(owns.any(0), torch.nan)
    empty = every["logsumexp"] == -torch.inf
    reference = every["logsumexp"].amax(0)
    reference = reference.where(reference != -torch.inf, 0.0)
    others = torch.exp(every["logsumexp"] - reference) * every["rest"]
    others = others.where(~empty, 0.0).sum(0)
    own = torch.exp(target - reference)
    total = others + own
    logsumexp = reference + torch.log(total)
    # a label that outweighs the rest has a log-prob near 0, which a difference would blur
    logps = torch.where(own > others, -torch.log1p(others / own), target - logsumexp)
    log_share = every["logsumexp"] - logsumexp
    share = torch.exp(log_share)

    out = {"logps": logps, "logsumexp": logsumexp}
    if "entropy" in mine:
        terms = share * (every["entropy"] - log_share)
        out["entropy"] = terms.where(share != 0, 0.0).sum(0)
    if "log_sum_sq_probs" in mine:
        terms = every["log_sum_sq_probs"] + 2 * log_share
        out["log_sum_sq_probs"] = terms.where(~empty, -torch.inf).logsumexp(0)
    if "sum" in mine:
        out["mean_logits"] = every["sum"].sum(0) / call.shard.total
    if "is_top1" in mine:
        # the first maximum wins a tie: earlier ranks must be lower, later ones not higher
        later = owns.cumsum(0) > 0
        wins = torch.where(later, every["row_max"] <= target, every["row_max"] < target)
        out["is_top1"] = (wins | owns).all(0) & (every["is_top1"] * owns).any(0)
    out = {name: value if name == "is_top1" else value.to(dtype) for name, value in out.items()}
    return out, kept._replace(
        target_logit=target.to(dtype),
        logsumexp=out["logsumexp"],
        rest=(others / total).to(dtype),
        entropy=out.get("entropy"),
        share=share[call.shard.group.rank()].to(dtype),
    )


def backward(
    run: Callable[..., dict[str, torch.Tensor]],
    call: Call,
    rows: Rows,
    inputs: Inputs,
    kept: Kept,
    grads: RowGrads,
    need: frozenset[str],
) -> dict[str, torch.Tensor]:
    """Return the gradients of a backend's backward: hidden's and lora_a's summed over the ranks.

    The sum is taken in fp32, before the one rounding to the tensor's dtype.
    """
    sums = {
        name: kept.logsumexp.new_zeros(rows.count, tensor.shape[-1])
        for name, tensor in (("hidden", inputs.hidden), ("lora_a", inputs.lora_a))
        if name in need
    }
    grad = run(call, rows, inputs, kept, grads, need, into=sums)
    for name, total in sums.items():
        if total.numel():
            dist.all_reduce(total, group=call.shard.group)
        tensor = getattr(inputs, name)
        grad[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        rows.put_all(grad[name], total, call.plan.row_chunk)
    return grad


def _gather(mine: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return every rank's tensor, ``[R, *]``."""
    out = mine.new_empty(group.size(), *mine.shape)
    if mine.numel():
        dist.all_gather(list(out.unbind()), mine, group=group)
    return out
