"""The fused LM head that SPOTrainer installs: log-probs, and the degree loss of the same forward.

It takes the place of TRL's ``add_fused_lm_head`` and does what DPOTrainer needs of it:
``model(..., labels=..., fused_lm_head=True)`` returns per-token log-probs without logits, any other
call is the model's own.
"""

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput

from spo_kernels import linear_logprob

from .lm_head import logit_transform, whole_head
from .text_views import pool_views, telescope

DEGREE_HEAD = "spo_degree_head"

# TRL's names of our outputs
_FIELD_OF = {"log_probs": "logps"}


@dataclass
class SPOCausalLMOutput(FusedCausalLMOutput):
    """TRL's output with what ``degree_loss`` returned; S responses, chosen ones first.

    The fields are declared because DDP rebuilds outputs from their fields and loses anything else.
    """

    degree_losses: torch.Tensor | None = None  # [S]
    degree_correct_views: torch.Tensor | None = None  # [S]
    degree_counted_views: torch.Tensor | None = None  # [S]
    degree_view_mask: torch.Tensor | None = None  # [S, K]


@dataclass(frozen=True)
class FusedHeadSettings:
    """What the fused head hands on to ``linear_logprob`` and to the pooling of text views."""

    budget_bytes: int | None = None
    backend: str = "auto"
    pooling: str = "mean"


@contextmanager
def fused_heads_installed_by_dpo_trainer(settings: FusedHeadSettings) -> Iterator[None]:
    """Let ``DPOTrainer.__init__`` install our fused head on policy and reference model.

    It has to happen inside: the reference model is prepared, and its log-probs may be precomputed,
    before that method returns.
    """
    original = dpo_trainer.add_fused_lm_head
    dpo_trainer.add_fused_lm_head = functools.partial(install_fused_head, settings=settings)
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head = original


def install_fused_head(
    model: PreTrainedModel,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    settings: FusedHeadSettings,
) -> None:
    """Let ``model(..., labels=..., fused_lm_head=True)`` score its labels without logits."""
    fused = FusedForward(model, outputs, settings)

    def forward(self: PreTrainedModel, *args: Any, **inputs: Any):
        return fused(*args, **inputs)

    # what generate() may pass is read off the signature
    forward.__signature__ = inspect.signature(type(model).forward)
    # engines take a forward apart and bind it again, so it has to be a method
    model.forward = types.MethodType(forward, model)


class FusedForward:
    """A model's forward that also answers ``fused_lm_head=True``; every other call passes through.

    With ``degree_inputs`` (see ``spo_kernels.collator``) the same forward also computes the degree
    loss with the module ``model.spo_degree_head``.
    """

    def __init__(
        self, model: PreTrainedModel, outputs: tuple[str, ...], settings: FusedHeadSettings
    ) -> None:
        self.model = model
        self.settings = settings
        self.plain_forward = model.forward
        self.outputs = tuple(_FIELD_OF.get(name, name) for name in outputs)
        self.transform = logit_transform(model.config.get_text_config())

    def __call__(
        self,
        *args: Any,
        fused_lm_head: bool = False,
        degree_inputs: dict[str, Any] | None = None,
        scored_rows: int | None = None,
        **inputs: Any,
    ):
        if not fused_lm_head:
            return self.plain_forward(*args, **inputs)
        labels = inputs.pop("labels")
        states = self.model.base_model(*args, **{**inputs, "use_cache": False})
        head = self.model.get_output_embeddings()
        # layers may be spread over devices: everything meets where the head is
        hidden = states.last_hidden_state.to(head.weight.device)
        next_tokens = labels[:, 1:].to(head.weight.device)
        with whole_head(head.weight, head.bias) as (weight, bias):
            scored = linear_logprob(
                # the rows after those of the labels are shortened responses, which are not scored
                hidden[: len(labels), :-1],
                weight,
                next_tokens,
                bias=bias,
                outputs=self.outputs,
                scored_rows=scored_rows,
                budget_bytes=self.settings.budget_bytes,
                backend=self.settings.backend,
                **self.transform,
            )
        router = None
        if inputs.get("output_router_logits"):
            of_responses = inputs["attention_mask"].clone()
            of_responses[len(labels) :] = 0
            router = _router_loss(
                self.model.config.get_text_config(), states.router_logits, of_responses
            )
        degree = {}
        if degree_inputs is not None:
            module = getattr(self.model, DEGREE_HEAD)
            result = module(*_degree_rows(hidden, degree_inputs, self.settings.pooling))
            degree = {f"degree_{name}": value for name, value in result._asdict().items()}
        return SPOCausalLMOutput(
            log_probs=scored.logps,
            entropy=scored.entropy,
            log_sum_sq_probs=scored.log_sum_sq_probs,
            mean_logits=scored.mean_logits,
            is_top1=scored.is_top1,
            aux_loss=router,
            **degree,
        )


def _degree_rows(
    hidden: torch.Tensor, inputs: dict[str, Any], pooling: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rows, levels and offsets that the degree head reads."""
    inputs = {name: value.to(hidden.device) for name, value in inputs.items()}
    levels, offsets = inputs["removal_levels"], inputs["segment_offsets"]
    if "view_order" not in inputs:
        return hidden.flatten(0, 1), levels.flatten(), offsets
    pooled = pool_views(hidden, inputs["completion_mask"], pooling)
    return telescope(pooled, inputs["view_order"], levels, offsets), levels, offsets


def _router_loss(
    config: PretrainedConfig, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor
) -> torch.Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(
        router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )
