"""Torch backend of ``unpaired_preference_loss``: the kernels' launchers in plain torch.

fp32 arithmetic, fp64 where an input is fp64. Nothing is read back to the host and no loop runs over
responses.
"""

import torch
import torch.nn.functional as F

from spo_kernels.calls.checks import compute_dtype
from spo_kernels.calls.loss_table import UnpairedParameters
from spo_kernels.torch_backend.segments import segments_of


def _kto(d, sign, baseline, beta):
    z = baseline.clamp(min=0.0)
    margin = sign * beta * (d - z)
    losses = torch.sigmoid(-margin)
    return losses, losses * torch.sigmoid(margin), torch.stack((z, torch.zeros_like(z)))


def _apo_zero_unpaired(d, sign, baseline, beta):
    margin = sign * beta * d
    losses = torch.sigmoid(-margin)
    return losses, losses * torch.sigmoid(margin), d.new_zeros(2)


def _bco(d, sign, baseline, beta):
    margin = sign * (beta * d - baseline)
    losses = -F.logsigmoid(margin)
    return losses, torch.sigmoid(-margin), torch.stack((torch.zeros_like(baseline), baseline))


# each returns (loss, slope of -sign beta d, the two baselines it used: z, reward shift)
LOSS_OF = {"kto": _kto, "apo_zero_unpaired": _apo_zero_unpaired, "bco": _bco}


def unpaired_preference_loss_fwd(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    is_desirable: torch.Tensor,
    segment_offsets: torch.Tensor | None,
    kl_logps: torch.Tensor | None,
    ref_kl_logps: torch.Tensor | None,
    baseline: torch.Tensor | None,
    *,
    ref_has_tokens: bool,
    loss_type: str,
    parameters: UnpairedParameters,
) -> tuple[torch.Tensor, ...]:
    """Return (losses [S], grads [S], rewards [S], sums [S], baselines [2]). Inputs are checked."""
    dtype = compute_dtype(logps, ref_logps)
    logps = logps.to(dtype)
    sums = _sums(logps, segment_offsets)
    if ref_logps is None:
        d = sums
    elif ref_has_tokens:
        # subtracted before they are summed: equal models have d of exactly 0
        d = _sums(logps - ref_logps.to(dtype), segment_offsets)
    else:
        d = sums - ref_logps.to(dtype)
    rewards = parameters.beta * d
    sign = is_desirable.to(dtype) * 2.0 - 1.0
    desirable, undesirable = parameters.desirable_weight, parameters.undesirable_weight
    weights = torch.where(is_desirable, desirable, undesirable).to(dtype)

    if baseline is not None:
        baseline = baseline.to(dtype)
    elif loss_type == "kto":
        kl = kl_logps.to(dtype) - ref_kl_logps.to(dtype)
        baseline = kl.sum() / max(kl.numel(), 1)
    elif loss_type == "bco":
        baseline = _mean_rewards(rewards, is_desirable)
    losses, slope, baselines = LOSS_OF[loss_type](d, sign, baseline, parameters.beta)
    grads = -parameters.beta * sign * slope
    return weights * losses, weights * grads, rewards, sums, baselines


def unpaired_preference_loss_bwd_tokens(
    grads: torch.Tensor,
    grad_losses: torch.Tensor,
    segment_offsets: torch.Tensor,
    *,
    tokens: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return grad_logps [N]: each token takes its response's gradient, 0 outside every one."""
    rows = F.pad((grads * grad_losses).to(dtype), (0, 1))
    return rows.index_select(0, segments_of(segment_offsets, tokens))


def _sums(logps: torch.Tensor, segment_offsets: torch.Tensor | None) -> torch.Tensor:
    """Return [S]: the sum of each response's tokens."""
    if segment_offsets is None:
        # an output is a tensor of its own, and the order of a sum depends on the strides
        return logps.contiguous().sum(1) if logps.dim() == 2 else logps.clone()
    # one by one in fp64, since thousands of tokens one by one lose digits in fp32
    flat = logps.reshape(-1).double()
    # the last slot takes the tokens that no response holds
    sums = flat.new_zeros(segment_offsets.numel())
    sums = sums.index_add(0, segments_of(segment_offsets, flat.numel()), flat)
    return sums[:-1].to(logps.dtype)


def _mean_rewards(rewards: torch.Tensor, is_desirable: torch.Tensor) -> torch.Tensor:
    """The mean over the two sides of their mean reward; a side without responses is left out."""
    sides = torch.stack((is_desirable, ~is_desirable))
    counts = sides.sum(1).to(rewards.dtype)
    means = torch.where(sides, rewards, 0.0).sum(1) / counts.clamp(min=1.0)
    return means.sum() / (counts > 0).sum().clamp(min=1)
