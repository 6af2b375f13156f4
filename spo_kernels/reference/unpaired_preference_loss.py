"""Naive eager ``unpaired_preference_loss``: oracle of the tests and readable spec.

Any float dtype, differentiable by autograd, one response at a time; never used by a
backend.
"""

import torch
import torch.nn.functional as F

# the logistic sigmoid as exp(log(.)): its gradient is not lost where it is 1


def _kto(d, sign, z, shift, beta):
    return F.logsigmoid(-sign * beta * (d - z)).exp()


def _apo_zero_unpaired(d, sign, z, shift, beta):
    return F.logsigmoid(-sign * beta * d).exp()


def _bco(d, sign, z, shift, beta):
    return -F.logsigmoid(sign * (beta * d - shift))


LOSS_OF = {"kto": _kto, "apo_zero_unpaired": _apo_zero_unpaired, "bco": _bco}


def unpaired_preference_loss_reference(
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
) -> dict[str, torch.Tensor]:
    """Return every output of ``unpaired_preference_loss`` by name, in the log-probs' dtype."""

    def sums_of(tokens):
        if segment_offsets is not None:
            bounds = segment_offsets.tolist()
            parts = [tokens.reshape(-1)[a:b].sum() for a, b in zip(bounds, bounds[1:])]  # noqa: B905
            return torch.stack(parts) if parts else tokens.reshape(-1)[:0]
        return tokens.sum(-1) if tokens.dim() == 2 else tokens

    sums = sums_of(logps)
    d = sums
    if ref_logps is not None:
        d = d - (sums_of(ref_logps) if ref_logps.shape == logps.shape else ref_logps)
    rewards = beta * d
    z = shift = torch.zeros((), dtype=d.dtype)
    losses = []
    if loss_type == "kto":
        if kl is None:
            kl = (kl_logps - ref_kl_logps).sum() / max(len(kl_logps), 1)
        z = kl.detach().to(d.dtype).clamp(min=0)
    if loss_type == "bco":
        if reward_shift is None:
            sides = [rewards[is_desirable], rewards[~is_desirable]]
            means = [side.mean() for side in sides if len(side)]
            reward_shift = sum(means) / len(means) if means else shift
        shift = reward_shift.detach().to(d.dtype)
    for s, desirable in enumerate(is_desirable.tolist()):
        sign = 1 if desirable else -1
        loss = LOSS_OF[loss_type](d[s], sign, z, shift, beta)
        losses.append(loss * (desirable_weight if desirable else undesirable_weight))
    return {
        "losses": torch.stack(losses) if losses else d[:0],
        "rewards": rewards.detach(),
        "logps": sums.detach(),
        "kl": z.to(d.dtype),
        "reward_shift": shift,
    }
