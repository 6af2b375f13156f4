"""The LoRA adapter of an LM head, as the two factors that ``linear_logprob`` adds to the logits."""

from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass(frozen=True)
class HeadAdapter:
    """One active adapter of a head: it adds ``scaling * rows @ a.T @ b.T`` to the logits."""

    rows: torch.Tensor  # [..., H] hidden states after the adapter's dropout
    scaling: float
    a: torch.Tensor  # [r, H]
    b: torch.Tensor  # [V, r]


def head_adapters(head: nn.Module, hidden: torch.Tensor) -> list[HeadAdapter]:
    """Return what is active on a head: nothing while its adapters are disabled or merged.

    Dropout is drawn for all of hidden, as PEFT does, so that the same seed drops the same values.
    """
    if not isinstance(head, BaseTunerLayer) or head.disable_adapters or head.merged:
        return []
    if not isinstance(head, LoraLinear):
        _refuse(type(head).__name__)
    found = []
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in head.lora_variant:
            _refuse(type(head.lora_variant[name]).__name__)
        if head.lora_B[name].bias is not None:
            _refuse("lora_bias=True")
        a, b = head.lora_A[name].weight, head.lora_B[name].weight
        rows = head.lora_dropout[name](hidden.to(a.dtype))
        found.append(HeadAdapter(rows, head.scaling[name], a, b))
    return found


def lora_factors(
    adapters: list[HeadAdapter], whole: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return ``(a_out, b)``; ``whole`` holds every ``a``, then every ``b``, in one piece."""
    if not adapters:
        return None
    count = len(adapters)
    a_outs = [
        nn.functional.linear(adapter.rows, a) * adapter.scaling
        for adapter, a in zip(adapters, whole[:count], strict=True)
    ]
    if count == 1:
        return a_outs[0].to(dtype), whole[1].to(dtype)
    return torch.cat(a_outs, dim=-1).to(dtype), torch.cat(whole[count:], dim=-1).to(dtype)


def _refuse(found: str) -> None:
    raise NotImplementedError(
        f"fused LM head: the adapter on lm_head must be plain LoRA of a Linear, got {found}. "
        "Remove 'lm_head' from target_modules, or train it in full with modules_to_save."
    )
