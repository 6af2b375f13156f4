"""Stands in for the policy inside TRL's loss: one of its calls gets the batch's degree inputs.

TRL passes a batch on to every call it makes; only the call that scores the batch's own labels may
see the columns that the collator has added.
"""

from typing import Any

import torch
from torch import nn

from spo_kernels.integrations.lm_head.fused_head import SPOCausalLMOutput

# columns that the collator adds to a batch of TRL's
_VIEW_TENSORS = ("view_input_ids", "view_attention_mask", "view_completion_mask", "view_order")
_ADDED_KEYS = frozenset(("removal_levels", "segment_offsets", "scored_rows", *_VIEW_TENSORS))


def without_added(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch without the added columns, as TRL knows it."""
    return {name: value for name, value in inputs.items() if name not in _ADDED_KEYS}


class PolicyCall:
    """Adds a batch's degree inputs to the call that scores it, and keeps that call's output."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], *, with_degree: bool):
        self.model = model
        self.inputs = inputs
        self.with_degree = with_degree
        self.output: SPOCausalLMOutput | None = None

    def __call__(self, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return self.model(**kwargs)
        if self.with_degree:
            kwargs |= self._degree_arguments(kwargs)
        self.output = self.model(**kwargs)
        return self.output

    def _degree_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        batch = self.inputs
        if "removal_levels" not in batch:
            raise ValueError(
                "SPO trainer: the batch must have removal_levels, got "
                f"{sorted(batch)}. Use the default data_collator, or one that returns the same."
            )
        degree = {name: batch[name] for name in ("removal_levels", "segment_offsets")}
        arguments = {"degree_inputs": degree, "scored_rows": batch.get("scored_rows")}
        if "view_input_ids" in batch:
            degree["view_order"] = batch["view_order"]
            degree["completion_mask"] = torch.cat(
                (batch["completion_mask"], batch["view_completion_mask"])
            )
            for name in ("input_ids", "attention_mask"):
                arguments[name] = torch.cat((kwargs[name], batch[f"view_{name}"]))
        return arguments
