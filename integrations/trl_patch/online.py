"""Online DPO and A2PO on the fused head: log-probs of completions that were just generated."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spo_kernels.integrations.lm_head.fused_head import FusedHeadSettings
from spo_kernels.integrations.trl_patch.change import Change
from spo_kernels.integrations.trl_patch.init import fused_head_after_init, fused_head_of, install_on

_ONLINE = "trl.experimental.online_dpo.online_dpo_trainer"
_A2PO = "trl.experimental.a2po.a2po_trainer"
_VISION = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")


def changes(settings: FusedHeadSettings) -> list[Change]:
    """Return the changes that serve Online DPO and A2PO."""
    on_models = fused_head_after_init((), settings)
    on_copy = functools.partial(_fused_copy, settings)
    install = "installs the fused head on policy and reference"
    copied = "the copy that becomes the reference gets the fused head before it is prepared"
    return [
        Change(f"{_ONLINE}:OnlineDPOTrainer", "__init__", install, on_models),
        Change(_ONLINE, "create_reference_model", copied, on_copy),
        Change(
            f"{_ONLINE}:OnlineDPOTrainer",
            "_forward",
            "scores every position of a completion on the fused head, without logits",
            _online_forward,
        ),
        Change(f"{_A2PO}:A2POTrainer", "__init__", install, on_models),
        Change(_A2PO, "create_reference_model", copied, on_copy),
        Change(
            f"{_A2PO}:A2POTrainer",
            "_get_sequence_logps",
            "scores a completion on the fused head, without logits",
            _sequence_logps,
        ),
    ]


def _fused_copy(
    settings: FusedHeadSettings, original: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    @functools.wraps(original)
    def create_reference_model(*args: Any, **kwargs: Any) -> nn.Module:
        reference = original(*args, **kwargs)
        install_on(reference, (), settings)
        return reference

    return create_reference_model


def _online_forward(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def _forward(
        self, model, prompt_ids, prompt_mask, completion_ids, completion_mask, vision_inputs=None
    ) -> torch.Tensor:
        length = completion_ids.size(1)
        if vision_inputs is None:
            # images would lose their tokens
            too_many = max(prompt_ids.size(1) + length - self.max_length, 0)
            prompt_ids, prompt_mask = prompt_ids[:, too_many:], prompt_mask[:, too_many:]
        # without a prompt TRL's logits are not aligned with the tokens
        if fused_head_of(self) is None or prompt_ids.size(1) == 0:
            return original(
                self, model, prompt_ids, prompt_mask, completion_ids, completion_mask, vision_inputs
            )
        vision = {name: vision_inputs[name] for name in _VISION if name in (vision_inputs or {})}
        scored = model(
            torch.cat((prompt_ids, completion_ids), dim=1),
            attention_mask=torch.cat((prompt_mask, completion_mask), dim=1),
            # padding too: the entropy and KL that are logged count it
            labels=torch.cat((torch.full_like(prompt_ids, -100), completion_ids), dim=1),
            fused_lm_head=fused_head_of(self),
            **vision,
        )
        return scored.log_probs[:, -length:]

    return _forward


def _sequence_logps(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def _get_sequence_logps(self, model, input_ids, attention_mask, logits_to_keep):
        if fused_head_of(self) is None:
            return original(self, model, input_ids, attention_mask, logits_to_keep)
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        prompt = positions < input_ids.size(1) - logits_to_keep
        scored = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=input_ids.masked_fill(prompt | (attention_mask == 0), -100),
            fused_lm_head=fused_head_of(self),
        )
        return scored.log_probs.sum(dim=1)

    return _get_sequence_logps
