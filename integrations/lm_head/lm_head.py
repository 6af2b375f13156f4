"""Read off a model for its fused LM head: the logit transform, the plain layer, the weight.

Needs transformers only; PEFT is imported where a model already uses it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig
from transformers.utils import is_peft_available

# config attribute of each family -> how its value enters the logits
LOGIT_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": float,
    "output_multiplier": float,
    "lm_head_multiplier": float,
    "logits_scaling": lambda divisor: 1.0 / divisor,
    "logits_mup_width_multiplier": lambda divisor: 1.0 / divisor,
}
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transform(config: PretrainedConfig, applied: Collection[str]) -> dict[str, float | None]:
    """Return what the architecture does to its logits, as arguments of ``linear_logprob``.

    Only settings whose names are in ``applied`` count, the names that the model's class uses: MPT
    has a ``logit_scale`` and ignores it.
    """
    found = {
        name: getattr(config, name, None) for name in (*LOGIT_SCALES, *SOFTCAPS) if name in applied
    }
    scale = next((name for name in LOGIT_SCALES if found.get(name) is not None), None)
    factor = 1.0 if scale is None else LOGIT_SCALES[scale](found[scale])
    if scale == "logits_scaling" and config.model_type == "hyperclovax":
        # this one family multiplies by what the others divide by
        factor = found[scale]
    softcaps = (found[name] for name in SOFTCAPS if found.get(name) is not None)
    return {"logit_scale": float(factor), "softcap": next(softcaps, None)}


@dataclass(frozen=True)
class HeadLayers:
    """A head as the plain layer it is and the LoRA terms that are added to it now."""

    linear: torch.nn.Linear
    # dropout, A, B, scaling of each active adapter
    lora: tuple[tuple[torch.nn.Module, torch.nn.Linear, torch.nn.Linear, float], ...] = ()

    def whole(self, hidden: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
        """Return weight, bias and lora of ``linear_logprob``, whole however they are sharded.

        ``lora`` is ``(scaling * A(dropout(hidden)), B)`` of all terms side by side, or None. All
        come in hidden's dtype, as far as autocast does not see to that.
        """
        factors = [b.weight for _, _, b, _ in self.lora]
        weight, bias, *factors = whole_head(self.linear.weight, self.linear.bias, *factors)
        lora = None
        if factors:
            terms = [
                (a(dropout(hidden.to(a.weight.dtype))) * scaling).to(hidden.dtype)
                for dropout, a, _, scaling in self.lora
            ]
            lora = torch.cat(terms, dim=-1), torch.cat(factors, dim=-1).to(hidden.dtype)
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        return weight, bias, lora


def head_layers(op: str, head: torch.nn.Module) -> HeadLayers:
    """Take a head apart, refusing what ``hidden @ weight.T + bias + LoRA`` does not describe."""
    terms: tuple = ()
    if is_peft_available():
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            adapters = [] if head.disable_adapters else head.active_adapters
            head = head.modules_to_save[adapters[0]] if adapters else head.original_module
        elif isinstance(head, BaseTunerLayer):
            terms = _lora_terms(op, head)
            head = head.base_layer
    # FSDP2 gives each module a class of its own that keeps its forward
    if getattr(type(head), "forward", None) is not torch.nn.Linear.forward:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise NotImplementedError(f"{op}: the LM head must be a plain torch.nn.Linear, got {kind}")
    for name, tensor in (("weight", head.weight), ("bias", head.bias)):
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) or isinstance(tensor, DTensor)
        if tensor is not None and not (plain and tensor.is_floating_point()):
            kind = f"{type(tensor).__name__} of {tensor.dtype}"
            raise NotImplementedError(
                f"{op}: the LM head's {name} must be a plain floating-point tensor, got {kind}"
            )
    return HeadLayers(head, terms)


def _lora_terms(op: str, layer: Any) -> tuple:
    from peft.tuners.lora import layer as lora_layer

    def refuse(kind: str) -> None:
        raise NotImplementedError(
            f"{op}: the LM head's adapter must be plain LoRA, got {kind}. Leave the head out of "
            "target_modules or train it whole with modules_to_save."
        )

    if type(layer) is not lora_layer.Linear:
        refuse(f"{type(layer).__module__}.{type(layer).__name__}")
    # a merged adapter is in the base weight already
    if layer.merged or layer.disable_adapters:
        if layer.merged and layer.disable_adapters:
            layer.unmerge()
        return ()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        if name in layer.lora_variant:
            refuse(f"{type(layer.lora_variant[name]).__name__} ({name!r})")
        if layer.lora_B[name].bias is not None:
            refuse(f"LoRA with lora_bias ({name!r})")
    return tuple(
        (layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name], layer.scaling[name])
        for name in names
    )


def whole_head(*parameters: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Return the head's parameters in one piece where FSDP2 shards them; one gather per call.

    What ZeRO-3 shards is whole already: DeepSpeed gathers a parameter that is read inside the
    model's forward, and once more before the model's backward.
    """
    return tuple(None if value is None else _full_tensor(value) for value in parameters)


def _full_tensor(sharded: torch.Tensor) -> torch.Tensor:
    if not isinstance(sharded, DTensor):
        return sharded
    # without placements of its own the gradient would keep every rank's share unreduced
    placements = [Partial("avg")] * sharded.device_mesh.ndim
    return sharded.full_tensor(grad_placements=placements)
