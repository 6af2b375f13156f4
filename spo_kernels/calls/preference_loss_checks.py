"""Checks of ``preference_loss``, all made before anything is allocated."""

from collections.abc import Sequence
from typing import Any

import torch

from spo_kernels.calls.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_dtype,
    check_number,
    check_parameters,
    check_same_device,
    check_shape,
    check_tensor,
    dtype_name,
    fail,
    is_finite,
)
from spo_kernels.calls.loss_table import (
    F_DIVERGENCES,
    LOSS_TYPE_NAMES,
    PARAMETERS,
    LossType,
    Parameters,
    ada_inverse_root,
    loss_type_of,
)
from spo_kernels.calls.preference_loss import LossOptions, PairData, Side

_OP = "preference_loss"
_FLOATS = (*FLOAT_DTYPES, torch.float64)
_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)
# response -> field of its Side -> the argument's name
_ARGUMENTS = {
    which: {
        "logps": f"{which}_logps",
        "ref": f"ref_{which}_logps",
        "mask": f"{which}_mask",
        "offsets": f"{which}_offsets",
        "lengths": f"{which}_lengths",
        "log_sum_sq": f"{which}_log_sum_sq_probs",
    }
    for which in ("chosen", "rejected", "response")
}


def _check_mix(
    loss_type: str | Sequence[str], loss_weights: Sequence[float] | None
) -> tuple[tuple[LossType, ...], tuple[float, ...]]:
    """Return the rows and weights of a mix of loss types."""
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    if not isinstance(names, Sequence) or not names:
        got = repr(loss_type)
        fail(_OP, "loss_type", "be a name or a non-empty sequence of names", got, error=TypeError)
    for name in names:
        check_choice(_OP, "loss_type", name, LOSS_TYPE_NAMES)
    losses = tuple(loss_type_of(name) for name in names)
    if loss_weights is None:
        return losses, (1.0,) * len(names)
    if not isinstance(loss_weights, Sequence):
        got = type(loss_weights).__name__
        fail(_OP, "loss_weights", "be a sequence of Python floats", got, error=TypeError)
    if len(loss_weights) != len(names):
        fail(_OP, "loss_weights", f"have one weight for each of {len(names)} types", loss_weights)
    for weight in loss_weights:
        check_number(_OP, "loss_weights", weight)
        if not is_finite(weight):
            fail(_OP, "loss_weights", "be finite", weight)
    return losses, tuple(float(weight) for weight in loss_weights)


def check_options(
    *,
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    ld_alpha: float | None,
    **parameters: float,
) -> LossOptions:
    """Check the options that every op with a preference loss takes, parameters by the table."""
    losses, weights = _check_mix(loss_type, loss_weights)
    values = check_parameters(_OP, parameters, PARAMETERS)
    for loss in losses:
        for name in loss.positive:
            if values[name] == 0.0:
                fail(_OP, name, f"be > 0 for loss_type={loss.name!r}", values[name])
    if values["ada_tau_max"] < values["ada_tau_min"]:
        low, high = values["ada_tau_min"], values["ada_tau_max"]
        fail(_OP, "ada_tau_max", f"be at least ada_tau_min={low:g}", high)
    divergence = f_divergence_type
    check_choice(_OP, "f_divergence_type", divergence, F_DIVERGENCES)
    check_number(_OP, "f_alpha_divergence_coef", f_alpha_divergence_coef)
    if not is_finite(f_alpha_divergence_coef):
        fail(_OP, "f_alpha_divergence_coef", "be finite", f_alpha_divergence_coef)
    power = float(f_alpha_divergence_coef) - 1.0
    if divergence == "alpha_divergence" and abs(power) < 1e-6:
        divergence = "reverse_kl"
    for loss in losses:
        if divergence != "reverse_kl" and not loss.divergence:
            able = ", ".join(repr(name) for name in sorted(LOSS_TYPE_NAMES) if _divergent(name))
            fail(
                _OP,
                "f_divergence_type",
                f"be 'reverse_kl' for loss_type={loss.name!r}",
                repr(divergence),
                way_out=f"Types with other divergences: {able}.",
            )
    if ld_alpha is not None:
        check_number(_OP, "ld_alpha", ld_alpha)
        if not 0.0 <= ld_alpha <= 1.0:
            fail(_OP, "ld_alpha", "be between 0 and 1, [0, 1]", ld_alpha)
        ld_alpha = float(ld_alpha)
    # a bisection, which only the types with this price read
    is_priced = any("ada_rho" in loss.parameters for loss in losses)
    inverse_root = ada_inverse_root(values["ada_rho"]) if is_priced else 0.0
    return LossOptions(
        losses=losses,
        weights=weights,
        parameters=Parameters(**values, ada_inverse_root=inverse_root),
        divergence=divergence,
        divergence_power=power,
        ld_alpha=ld_alpha,
    )


def _divergent(name: str) -> bool:
    return loss_type_of(name).divergence


def check_sides(chosen: Side, rejected: Side, response: Side, data: PairData, options: LossOptions):
    """Refuse tensors that do not form P pairs, or that the mix or a setting misses."""
    sides = {"chosen": chosen, "rejected": rejected, "response": response}
    named = {
        _ARGUMENTS[which][field]: tensor
        for which, side in sides.items()
        for field, tensor in zip(Side._fields, side, strict=True)
        if tensor is not None or (field == "logps" and which != "response")
    }
    pair_data = {"pair_weights": data.weights, "reward_chosen": data.reward_chosen}
    pair_data["reward_rejected"] = data.reward_rejected
    named |= {name: tensor for name, tensor in pair_data.items() if tensor is not None}
    for name, tensor in named.items():
        check_tensor(_OP, name, tensor)
    _check_missing(sides, pair_data, options)

    P = None
    for which, side in sides.items():
        if side.logps is None:
            continue
        P = _check_side(which, side, P)
    for name, tensor in pair_data.items():
        if tensor is not None:
            check_dtype(_OP, name, tensor, _FLOATS)
            check_shape(_OP, name, tensor, (P,), "[P] with P={0} like chosen_logps")
    for which in ("rejected", "response"):
        logps = sides[which].logps
        if logps is not None and logps.dtype != chosen.logps.dtype:
            want, got = dtype_name(chosen.logps.dtype), dtype_name(logps.dtype)
            requirement = f"have dtype {want} like chosen_logps"
            fail(_OP, f"{which}_logps", requirement, got, error=TypeError)
    check_same_device(_OP, named)


def _check_missing(sides: dict[str, Side], data: dict[str, Any], options: LossOptions) -> None:
    """Refuse an optional input that stands alone, or that a type or a setting needs."""
    two = [sides["chosen"], sides["rejected"]]
    for field in ("ref", "log_sum_sq"):
        chosen, rejected = (_ARGUMENTS[which][field] for which in ("chosen", "rejected"))
        _check_together(chosen, getattr(two[0], field), rejected, getattr(two[1], field))
    rewards = data["reward_chosen"], data["reward_rejected"]
    _check_together("reward_chosen", rewards[0], "reward_rejected", rewards[1])
    response = sides["response"]
    if response.logps is None:
        for field, tensor in zip(Side._fields, response, strict=True):
            if tensor is not None:
                argument = _ARGUMENTS["response"][field]
                fail(_OP, argument, "be None without response_logps", type(tensor).__name__)
    has_weights = data["pair_weights"] is not None or two[0].log_sum_sq is not None
    filters = options.parameters.min_reward_margin > 0
    for loss in options.losses:
        reason = f"for loss_type={loss.name!r}"
        if "lengths" in loss.inputs:
            _check_lengths(sides, ("chosen", "rejected"), reason)
        if "response" in loss.inputs and response.logps is None:
            fail(_OP, "response_logps", f"be given {reason}", None)
        if "response_lengths" in loss.inputs:
            _check_lengths(sides, ("response",), reason)
        if "rewards" in loss.inputs and data["reward_chosen"] is None:
            fail(_OP, "reward_chosen", f"be given {reason}", None)
        if loss.kind == "ranked" and (has_weights or filters):
            name = "pair_weights" if data["pair_weights"] is not None else "min_reward_margin"
            if two[0].log_sum_sq is not None:
                name = "chosen_log_sum_sq_probs"
            fail(_OP, name, f"be left out {reason}, which pairs by rank", "a weight of each pair")
    if response.logps is not None and not any("response" in loss.inputs for loss in options.losses):
        requirement = "be None where no type of the mix reads it"
        fail(_OP, "response_logps", requirement, tuple(response.logps.shape))
    if two[0].log_sum_sq is not None:
        _check_lengths(sides, ("chosen", "rejected"), "with chosen_log_sum_sq_probs")
    if filters and data["reward_chosen"] is None:
        fail(_OP, "reward_chosen", "be given with min_reward_margin", None)
    if options.ld_alpha is not None:
        for which, side in zip(("chosen", "rejected"), two, strict=True):
            if side.logps.dim() != 2:
                shape = tuple(side.logps.shape)
                fail(_OP, f"{which}_logps", "hold token log-probs [P, T] with ld_alpha", shape)


def _check_together(
    first_name: str, first: torch.Tensor | None, name: str, tensor: torch.Tensor | None
) -> None:
    if first is not None and tensor is None:
        fail(_OP, name, f"be given where {first_name} is", None)
    if first is None and tensor is not None:
        fail(_OP, first_name, f"be given where {name} is", None)


def _check_lengths(sides: dict[str, Side], which: tuple[str, ...], reason: str) -> None:
    for name in which:
        if sides[name].lengths is None and sides[name].mask is None:
            way_out = ""
            if sides[name].logps.dim() == 2:
                way_out = f"Or give {name}_mask, whose tokens are counted."
            fail(_OP, f"{name}_lengths", f"be given {reason}", None, way_out=way_out)


def _check_side(which: str, side: Side, P: int | None) -> int:
    """Check one response of every pair and return P."""
    names = _ARGUMENTS[which]
    logps = side.logps
    for field in ("logps", "ref", "log_sum_sq"):
        if getattr(side, field) is not None:
            check_dtype(_OP, names[field], getattr(side, field), _FLOATS)
    if side.mask is not None:
        check_dtype(_OP, names["mask"], side.mask, _MASKS)
    if side.offsets is not None:
        check_dtype(_OP, names["offsets"], side.offsets, (torch.int64,))
    if side.lengths is not None:
        check_dtype(_OP, names["lengths"], side.lengths, (torch.int32, torch.int64))

    if logps.dim() not in (1, 2):
        fail(
            _OP,
            names["logps"],
            "have shape [P] (sums) or [P, T] (token log-probs)",
            tuple(logps.shape),
        )
    if side.offsets is not None:
        if side.offsets.dim() != 1 or side.offsets.numel() == 0:
            fail(_OP, names["offsets"], "have shape [P + 1]", tuple(side.offsets.shape))
        if logps.dim() != 2:
            requirement = f"have two axes, [1, T] for packed tokens, with {names['offsets']}"
            fail(_OP, names["logps"], requirement, tuple(logps.shape))
    own = side.form.pairs
    if P is None:
        P = own
    elif own != P:
        way_out = ""
        if which == "rejected" and (P + own) % 2:
            way_out = f"A chosen/rejected batch must be even, got B={P + own}."
        axes = f"[P] with P={P} like chosen_logps"
        fail(_OP, names["logps"], f"have shape {axes}", tuple(logps.shape), way_out=way_out)
    for field in ("ref", "log_sum_sq"):
        tensor = getattr(side, field)
        if tensor is None:
            continue
        if tensor.dim() == 2 and logps.dim() == 2:
            shape = tuple(logps.shape)
            check_shape(_OP, names[field], tensor, shape, f"{shape} like {names['logps']}")
        else:
            check_shape(_OP, names[field], tensor, (P,), "[P] with P={0} like chosen_logps")
    if side.lengths is not None:
        spec = "[P] with P={0} like chosen_logps"
        check_shape(_OP, names["lengths"], side.lengths, (P,), spec)
    if side.mask is not None:
        if logps.dim() != 2:
            fail(
                _OP,
                names["mask"],
                f"be None where {names['logps']} are sums",
                tuple(side.mask.shape),
                way_out=f"Give {names['lengths']}.",
            )
        if side.lengths is not None:
            requirement = f"be None where {names['mask']} counts the tokens"
            fail(_OP, names["lengths"], requirement, tuple(side.lengths.shape))
        shape = tuple(logps.shape)
        check_shape(_OP, names["mask"], side.mask, shape, f"{shape} like {names['logps']}")
    return P
