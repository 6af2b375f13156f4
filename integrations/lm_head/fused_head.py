"""The fused LM head of the SPO trainers: log-probs, and the degree loss of the same forward.

It takes the place of TRL's ``add_fused_lm_head`` and does what its trainers need of it:
``model(..., labels=..., fused_lm_head=True)`` returns per-token log-probs without logits, any other
call is the model's own.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from spo_kernels import linear_logprob
from spo_kernels.integrations.lm_head.causal_model import decoder_of, names_used, router_loss
from spo_kernels.integrations.lm_head.lm_head import head_layers, logit_transform
from spo_kernels.integrations.spo.text_views import pool_views, telescope

DEGREE_HEAD = "spo_degree_head"

# linear_logprob's outputs -> TRL's fields
_TRL_NAME_OF = {
    "logps": "log_probs",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "is_top1",
}


@dataclass
class SPOCausalLMOutput(FusedCausalLMOutput):
    """TRL's output with what ``degree_loss`` returned; S responses, chosen ones first.

    The fields are declared because DDP rebuilds outputs from their fields and loses anything else.
    """

    position_mean_logits: torch.Tensor | None = None  # [B, T], prompt and padding included
    degree_losses: torch.Tensor | None = None  # [S]
    degree_correct_views: torch.Tensor | None = None  # [S]
    degree_counted_views: torch.Tensor | None = None  # [S]
    degree_view_mask: torch.Tensor | None = None  # [S, K]


@dataclass(frozen=True)
class FusedHeadSettings:
    """Arguments of the fused head for ``linear_logprob`` and for the pooling of text views."""

    budget_bytes: int | None = None
    backend: str = "auto"
    pooling: str = "mean"


@contextmanager
def fused_heads_installed_in(
    trainer: types.ModuleType, settings: FusedHeadSettings
) -> Iterator[None]:
    """Let ``__init__`` of a trainer's module install our fused head on policy and reference model.

    It has to happen inside: the reference model is prepared, and its log-probs may be precomputed,
    before that method returns.
    """
    original = trainer.add_fused_lm_head
    trainer.add_fused_lm_head = functools.partial(install_fused_head, settings=settings)
    try:
        yield
    finally:
        trainer.add_fused_lm_head = original


def install_fused_head(
    model: PreTrainedModel,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    settings: FusedHeadSettings,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    key: str | bool = True,
) -> None:
    """Let ``model(..., labels=..., fused_lm_head=key)`` score its labels without logits.

    ``outputs`` may name, besides TRL's own, ``position_mean_logits``: the mean logit of every
    position, scored or not. Heads of other keys that the model has go on to answer to theirs.
    """
    fused = FusedForward(model, outputs, settings, temperature, cast_lm_head_to_fp32, key)

    def forward(self: PreTrainedModel, *args: Any, **inputs: Any):
        return fused(self, *args, **inputs)

    # generate() reads off the signature which arguments it may pass
    forward.__signature__ = inspect.signature(type(model).forward)
    # engines take a forward apart and bind it again, so it has to be a method
    model.forward = types.MethodType(forward, model)


class FusedForward:
    """A model's forward that also answers ``fused_lm_head=key``; every other call passes through.

    With ``degree_inputs`` (see ``spo_kernels.collator``) the same forward also computes the degree
    loss with the module ``model.spo_degree_head``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        outputs: tuple[str, ...],
        settings: FusedHeadSettings,
        temperature: float,
        cast_lm_head_to_fp32: bool,
        key: str | bool,
    ) -> None:
        config = model.config.get_text_config()
        self.settings = settings
        self.key = key
        self.plain_forward = _unbound(model)
        self.outputs = {"log_probs", *outputs}
        self.cast_lm_head_to_fp32 = cast_lm_head_to_fp32
        transform = logit_transform(config, names_used(model, "__init__", "forward"))
        self.transform = {"temperature": temperature, **transform}

    def __call__(
        self,
        model: PreTrainedModel,
        *args: Any,
        fused_lm_head: str | bool = False,
        degree_inputs: dict[str, Any] | None = None,
        scored_rows: int | None = None,
        **inputs: Any,
    ):
        if fused_lm_head != self.key:
            if fused_lm_head:
                inputs["fused_lm_head"] = fused_lm_head
            return self.plain_forward(model, *args, **inputs)
        config = model.config.get_text_config()
        labels, shift_labels = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        num_items = inputs.pop("num_items_in_batch", None)
        if getattr(config, "output_router_logits", False):
            inputs.setdefault("output_router_logits", True)
        states = decoder_of(model)(*args, **{**inputs, "use_cache": False})
        device = model.get_output_embeddings().weight.device
        # layers may be spread over devices: everything meets where the head is
        hidden = states.last_hidden_state.to(device)
        targets = (labels[:, 1:] if shift_labels is None else shift_labels).to(device)
        scored = self._score(model, hidden, targets, scored_rows)
        mask = targets != -100
        count = mask.sum().clamp(min=1) if num_items is None else num_items
        loss = -scored["log_probs"].sum() / count
        router = None
        if inputs.get("output_router_logits"):
            counted = inputs.get("attention_mask")
            if counted is not None and len(counted) > len(targets):
                counted = counted.clone()
                counted[len(targets) :] = 0
            router = router_loss(model, states.router_logits, counted)
            if router is not None:
                loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * router
        degree = {}
        if degree_inputs is not None:
            module = getattr(model, DEGREE_HEAD)
            result = module(*_degree_rows(hidden, degree_inputs, self.settings.pooling))
            degree = {f"degree_{name}": value for name, value in result._asdict().items()}
        return SPOCausalLMOutput(loss=loss, label_mask=mask, aux_loss=router, **scored, **degree)

    def _score(
        self,
        model: PreTrainedModel,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        scored_rows: int | None,
    ) -> dict[str, torch.Tensor | None]:
        """Return the outputs that were asked for, under TRL's names."""
        layers = head_layers("fused_lm_head", model.get_output_embeddings())
        exact = nullcontext()
        if self.cast_lm_head_to_fp32:
            hidden = hidden.float()
            exact = torch.autocast(hidden.device.type, enabled=False)
        # the rows after those of the labels are shortened responses, which are not scored
        hidden = hidden[: len(targets)]
        # dropout is drawn for every position, as PEFT does: a seed drops the same values
        with exact:
            weight, bias, lora = layers.whole(hidden)
            length = targets.shape[1]
            scored = linear_logprob(
                hidden[:, :length],
                weight,
                targets,
                bias=bias,
                lora=None if lora is None else (lora[0][:, :length], lora[1]),
                outputs=tuple(ours for ours, trl in _TRL_NAME_OF.items() if trl in self.outputs),
                scored_rows=scored_rows,
                budget_bytes=self.settings.budget_bytes,
                backend=self.settings.backend,
                **self.transform,
            )
            values = {trl: getattr(scored, ours) for ours, trl in _TRL_NAME_OF.items()}
            if "position_mean_logits" in self.outputs:
                values["position_mean_logits"] = self._position_mean_logits(
                    hidden, weight, bias, lora
                )
        if values["mean_logits"] is not None:
            values["mean_logits"] = values["mean_logits"].detach()
        return values

    @torch.no_grad()
    def _position_mean_logits(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return ``[B, T]``; without a softcap a mean over V of logits is a product with a mean."""
        if self.transform["softcap"] is not None:
            return linear_logprob(
                hidden,
                weight,
                torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device),
                bias=bias,
                lora=lora,
                outputs=("mean_logits",),
                budget_bytes=self.settings.budget_bytes,
                backend=self.settings.backend,
                **self.transform,
            ).mean_logits
        with torch.autocast(hidden.device.type, enabled=False):
            means = hidden.float() @ weight.mean(0, dtype=torch.float32)
            if bias is not None:
                means = means + bias.float().mean()
            if lora is not None:
                means = means + lora[0].float() @ lora[1].mean(0, dtype=torch.float32)
        return means * (self.transform["logit_scale"] / self.transform["temperature"])


def _unbound(model: PreTrainedModel) -> Callable[..., Any]:
    """Return the model's forward as a function of the model: copies of the model share it."""
    bound = model.forward
    if getattr(bound, "__self__", None) is model:
        return bound.__func__
    return lambda _, *args, **inputs: bound(*args, **inputs)


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
