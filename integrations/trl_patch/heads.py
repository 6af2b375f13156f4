"""The names behind TRL's fused head: its late-bound function, its installer, its adapter guard."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from trl.trainer import utils as trl_utils

from spo_kernels import linear_logprob
from spo_kernels.integrations.lm_head.fused_head import FusedHeadSettings, install_fused_head
from spo_kernels.integrations.lm_head.lm_head import whole_head
from spo_kernels.integrations.trl_patch.change import Change, TRLPatch

_TRAINERS = {
    "DPO": "trl.trainer.dpo_trainer",
    "KTO": "trl.trainer.kto_trainer",
    "SFT": "trl.trainer.sft_trainer",
    "GRPO": "trl.trainer.grpo_trainer",
    "RLOO": "trl.trainer.rloo_trainer",
}
_ASYNC = "trl.experimental.async_grpo.async_grpo_trainer"


class LateBoundLogProb:
    """Takes the place of TRL's autograd function, which every fused head looks up when it runs.

    So it also serves the trainers that were built before the patch.
    """

    def __init__(self, settings: FusedHeadSettings, patch: TRLPatch) -> None:
        self.settings = settings
        self.patch = patch

    def apply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[torch.Tensor | None, ...]:
        """Return log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1 of N rows.

        ``chunk_size`` is the planner's.
        """
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        weight, bias = whole_head(weight, bias)
        scored = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            outputs=("logps", *(name for name in outputs if name != "log_probs")),
            budget_bytes=self.settings.budget_bytes,
            backend=self.settings.backend,
        )
        mean_logits = None if scored.mean_logits is None else scored.mean_logits.detach()
        return scored.logps, scored.entropy, scored.log_sum_sq_probs, mean_logits, scored.is_top1


class _NoInstance(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return False


class NoTunerLayer(metaclass=_NoInstance):
    """Stands for ``BaseTunerLayer`` where a trainer refuses an adapter on the LM head."""


def active_patch() -> TRLPatch | None:
    """Return the handle of the patch that is on."""
    current = trl_utils._ChunkedLogProbFunction
    return current.patch if isinstance(current, LateBoundLogProb) else None


def changes(settings: FusedHeadSettings, patch: TRLPatch) -> list[Change]:
    """Return the changes that serve DPO, KTO, SFT, GRPO, RLOO and AsyncGRPO."""

    def add_fused_lm_head(
        model: PreTrainedModel,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        if cast_lm_head_to_fp32 and isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ValueError(
                "patch_trl: cast_lm_head_to_fp32 must be False with an adapter on lm_head, got True"
            )
        install_fused_head(
            model,
            outputs,
            settings=settings,
            temperature=temperature,
            cast_lm_head_to_fp32=cast_lm_head_to_fp32,
        )

    found = [
        Change(
            "trl.trainer.utils",
            "_ChunkedLogProbFunction",
            "fused heads of TRL, those installed before too, compute with linear_logprob",
            lambda original: LateBoundLogProb(settings, patch),
        )
    ]
    for trainer, module in {**_TRAINERS, "AsyncGRPO": _ASYNC}.items():
        found.append(
            Change(
                module,
                "add_fused_lm_head",
                f"the fused head of {trainer} is ours, which knows a LoRA adapter of the LM head",
                lambda original: add_fused_lm_head,
            )
        )
    for trainer, module in _TRAINERS.items():
        found.append(
            Change(
                module,
                "BaseTunerLayer",
                f"{trainer} accepts a LoRA adapter on the LM head",
                lambda original: NoTunerLayer,
            )
        )
    effect = "AsyncGRPO accepts a LoRA adapter on the LM head"
    found.append(Change(_ASYNC, "get_peft_model", effect, _hide_adapter_of_head))
    found.append(Change(f"{_ASYNC}:AsyncGRPOTrainer", "__init__", effect, _show_adapter_of_head))
    return found


def _hide_adapter_of_head(get_peft_model: Callable[..., Any]) -> Callable[..., Any]:
    """Show AsyncGRPO the head without its adapter: it refuses one by a class it imports itself."""

    @functools.wraps(get_peft_model)
    def wrapped(*args: Any, **kwargs: Any):
        model = get_peft_model(*args, **kwargs)
        head = model.get_output_embeddings()
        if isinstance(head, BaseTunerLayer):
            model.get_output_embeddings = head.get_base_layer
        return model

    return wrapped


def _show_adapter_of_head(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        vars(self.model).pop("get_output_embeddings", None)

    return __init__
