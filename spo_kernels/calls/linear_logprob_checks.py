"""Checks that every op over a linear head shares."""

import torch

from spo_kernels.calls.checks import (
    FLOAT_DTYPES,
    check_dtype,
    check_positive_float,
    check_same_device,
    check_shape,
    check_tensor,
    dtype_name,
    fail,
)


def check_head_inputs(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    lora: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.dtype:
    """Refuse bad input and return the compute dtype (autocast's where it is on)."""
    named = {"hidden": hidden, "weight": weight, "labels": labels}
    for name, tensor in named.items():
        check_tensor(op, name, tensor)
    named["bias"] = bias
    floats = (*FLOAT_DTYPES, torch.float64)
    check_dtype(op, "hidden", hidden, floats)
    check_dtype(op, "labels", labels, (torch.int64, torch.int32))
    if hidden.dim() != labels.dim() + 1 or hidden.dim() < 2:
        fail(
            op,
            "labels",
            f"have hidden's leading shape {tuple(hidden.shape[:-1])}, at least one axis",
            tuple(labels.shape),
        )
    H = hidden.shape[-1]
    check_shape(op, "labels", labels, tuple(hidden.shape[:-1]), f"{tuple(hidden.shape[:-1])}")
    if weight.dim() == 2 and weight.numel() == 0:
        fail(
            op,
            "weight",
            f"hold [V, H] elements with H={H}",
            f"0 elements {tuple(weight.shape)}",
            way_out="A sharded head must be gathered first (ZeRO-3: GatheredParameters).",
            error=RuntimeError,
        )
    check_shape(op, "weight", weight, (None, H), "[V, H] with H={1}")
    V = weight.shape[0]
    heads = {"weight": weight}
    if bias is not None:
        check_tensor(op, "bias", bias)
        check_shape(op, "bias", bias, (V,), "[V] with V={0}")
        heads["bias"] = bias
    if lora is not None:
        if not (isinstance(lora, tuple) and len(lora) == 2):
            fail(op, "lora", "be a pair (a_out, b)", type(lora).__name__, error=TypeError)
        a_out, b = lora
        for name, tensor in (("lora a_out", a_out), ("lora b", b)):
            check_tensor(op, name, tensor)
        check_shape(op, "lora b", b, (V, None), "[V, r] with V={0}")
        if b.shape[1] == 0:
            fail(op, "lora b", "have rank r >= 1", 0)
        leading, rank = tuple(hidden.shape[:-1]), b.shape[1]
        check_shape(op, "lora a_out", a_out, (*leading, rank), f"{(*leading, rank)}")
        heads["lora a_out"], heads["lora b"] = a_out, b
    check_same_device(op, {**named, **heads})

    autocast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    for name, tensor in heads.items():
        check_dtype(op, name, tensor, floats)
        if tensor.dtype != hidden.dtype and not autocast:
            fail(
                op,
                name,
                f"have hidden's dtype {dtype_name(hidden.dtype)}",
                dtype_name(tensor.dtype),
                way_out="Cast one of them, or run under torch.autocast.",
                error=TypeError,
            )
    return torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype


def check_transform(
    op: str, temperature: float, logit_scale: float, softcap: float | None
) -> tuple[float, float, float | None]:
    """Return the numbers of the logits' transform as floats, refusing those that are not > 0."""
    temperature = check_positive_float(op, "temperature", temperature)
    logit_scale = check_positive_float(op, "logit_scale", logit_scale)
    if softcap is not None:
        softcap = check_positive_float(op, "softcap", softcap)
    return temperature, logit_scale, softcap
