"""The fused LM head that SPOTrainer installs: log-probs, and the degree loss of the same forward.

It takes the place of TRL's ``add_fused_lm_head`` and does what DPOTrainer needs of it:
``model(..., labels=..., fused_lm_head=True)`` returns per-token log-probs without logits, any other
call is the model's own.
"""

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from spo_kernels import linear_logprob

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
    dpo_trainer.add_fused_lm_head = functools.partial(add_fused_lm_head, settings=settings)
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head = original


def add_fused_lm_head(
    model: PreTrainedModel,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    settings: FusedHeadSettings,
) -> None:
    """Replace ``model.forward`` by one that understands ``fused_lm_head=True``.

    With ``degree_inputs`` (see ``spo_kernels.collator``) the same forward also computes the degree
    loss with the module ``model.spo_degree_head``.
    """
    original_forward = model.forward
    text_config = model.config.get_text_config()
    fields = tuple(_FIELD_OF.get(name, name) for name in outputs)
    scale = _logit_scale(text_config)
    softcap = getattr(text_config, "final_logit_softcapping", None)

    # generate() validates its arguments against this signature
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        degree_inputs: dict[str, Any] | None = None,
        scored_rows: int | None = None,
        **kwargs: Any,
    ):
        if not fused_lm_head:
            return original_forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        if getattr(text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        backbone = self.base_model(*args, **kwargs)
        head = self.get_output_embeddings()
        # with a device map the backbone may end on another device than the head
        hidden = backbone.last_hidden_state.to(head.weight.device)
        labels = labels[:, 1:].to(head.weight.device)
        with _whole_head(head.weight, head.bias) as (weight, bias):
            logprob = linear_logprob(
                # the rows after those of the labels are shortened responses, which are not scored
                hidden[: labels.size(0), :-1],
                weight,
                labels,
                bias=bias,
                logit_scale=scale,
                softcap=softcap,
                outputs=fields,
                scored_rows=scored_rows,
                budget_bytes=settings.budget_bytes,
                backend=settings.backend,
            )
        mask = labels != -100
        loss = -logprob.logps.sum() / mask.sum().clamp(min=1)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            attention_mask = kwargs["attention_mask"].clone()
            attention_mask[labels.size(0) :] = 0
            aux_loss = _router_loss(text_config, backbone.router_logits, attention_mask)
            loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * aux_loss
        degree = {}
        if degree_inputs is not None:
            module = getattr(self, DEGREE_HEAD)
            losses = module(*_degree_rows(hidden, degree_inputs, settings.pooling))
            degree = {f"degree_{name}": value for name, value in losses._asdict().items()}
        return SPOCausalLMOutput(
            loss=loss,
            log_probs=logprob.logps,
            entropy=logprob.entropy,
            log_sum_sq_probs=logprob.log_sum_sq_probs,
            mean_logits=logprob.mean_logits,
            is_top1=logprob.is_top1,
            label_mask=mask,
            aux_loss=aux_loss,
            **degree,
        )

    model.forward = types.MethodType(forward, model)


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


def _logit_scale(config: PretrainedConfig) -> float:
    """Return what the architecture multiplies its logits by, under whichever name it has."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor is not None:
            return float(factor)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / divisor


def _router_loss(
    config: PretrainedConfig, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor
) -> torch.Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(
        router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )


@contextmanager
def _whole_head(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Give the head in one piece, however it is sharded, with one collective per call."""
    if isinstance(weight, DTensor):
        yield _full_tensor(weight), None if bias is None else _full_tensor(bias)
        return
    with maybe_gather_lm_head_ctx(weight, bias):
        if not is_deepspeed_zero3_enabled():
            yield weight, bias
            return
        parameters = [p for p in (weight, bias) if p is not None]
        with saved_tensors_hooks(functools.partial(_release, parameters), _gather_again):
            yield weight, bias


def _full_tensor(sharded: DTensor) -> torch.Tensor:
    # without placements of its own the gradient would keep every rank's share unreduced
    placements = [Partial("avg")] * sharded.device_mesh.ndim
    return sharded.full_tensor(grad_placements=placements)


def _release(parameters: list[torch.nn.Parameter], tensor: torch.Tensor) -> torch.Tensor:
    """Keep for the backward the parameter itself, whose storage ZeRO-3 takes away in between."""
    for parameter in parameters:
        if tensor.data_ptr() == parameter.data_ptr() and tensor.shape == parameter.shape:
            return parameter
    return tensor


def _gather_again(kept: torch.Tensor) -> torch.Tensor:
    if not hasattr(kept, "ds_status"):
        return kept
    with maybe_gather_lm_head_ctx(kept):
        return kept.detach().clone()
