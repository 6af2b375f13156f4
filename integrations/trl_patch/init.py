"""Puts the fused head on a trainer's models when the trainer is built."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from spo_kernels.integrations.lm_head.causal_model import is_decoder_and_head
from spo_kernels.integrations.lm_head.fused_head import FusedHeadSettings, install_fused_head

# an attribute of the trainers whose models have the head: its key
_MARK = "spo_fused_head"


def install_on(model: nn.Module, outputs: tuple[str, ...], settings: FusedHeadSettings) -> bool:
    """Install the fused head under an adapter, if any.

    False, and nothing done, on a model whose log-probs it would not compute.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder:
        return False
    if not is_decoder_and_head(base):
        return False
    install_fused_head(base, outputs, settings=settings, key=_key(outputs))
    return True


def _key(outputs: tuple[str, ...]) -> str:
    """Return what these trainers ask for: a model may serve one of TRL's fused heads as well."""
    return ",".join(("log_probs", *outputs))


def mark_fused_head(
    trainer: Any, outputs: tuple[str, ...], settings: FusedHeadSettings, *, ready: bool = True
) -> None:
    """Install the fused head on a trainer's policy; its methods learn whether there is one."""
    if install_on(trainer.model, outputs, settings) and ready:
        setattr(trainer, _MARK, _key(outputs))


def fused_head_of(trainer: Any) -> str | None:
    """Return what to pass as ``fused_lm_head``, None if the models cannot score without logits.

    They can where the trainer was built under the patch, or by SPO.
    """
    return vars(trainer).get(_MARK)


def fused_head_after_init(
    outputs: tuple[str, ...], settings: FusedHeadSettings
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return what wraps a trainer's ``__init__``: a head has to be there before prepare().

    The policy is prepared by train(), a reference model before ``__init__`` returns.
    """

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            reference = signature.bind(self, *args, **kwargs).arguments.get("ref_model")
            ready = reference is None or install_on(reference, outputs, settings)
            original(self, *args, **kwargs)
            mark_fused_head(self, outputs, settings, ready=ready)

        return __init__

    return wrap
