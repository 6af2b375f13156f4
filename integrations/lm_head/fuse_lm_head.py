"""``fuse_lm_head``: the loss of any transformers causal language model without its logits.

For the plain ``transformers.Trainer`` and for loops of your own; TRL is not needed.
"""

import inspect
import math
import types
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from spo_kernels import linear_logprob
from spo_kernels.integrations.lm_head.causal_model import (
    causal_model,
    decoder_of,
    names_used,
    router_coefficient,
    router_loss,
)
from spo_kernels.integrations.lm_head.lm_head import head_layers, logit_transform

_OP = "fuse_lm_head"
_ATTRIBUTE = "_fused_lm_head"

# arguments of a model's forward that its decoder is not given
_NOT_FOR_DECODER = {
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "ignore_index",
    "logits_to_keep",
    "return_dict",
    "use_cache",
    "output_router_logits",
}


@dataclass(frozen=True)
class FusedLossSettings:
    """Terms that a fused forward adds to the cross-entropy, and arguments of ``linear_logprob``."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    budget_bytes: int | None = None
    backend: str = "auto"


def fuse_lm_head(
    model: torch.nn.Module,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    budget_bytes: int | None = None,
    backend: str = "auto",
) -> "FusedLMHead":
    """Let ``model(..., labels=...)`` return its loss without building the logits.

        loss = sum_n [-(1 - s) logps_n + s (lse_n - mean_v z_nv) + z_loss lse_n^2] / items
               (+ the model's own router loss)

    n runs over the tokens with a label, z are the logits as the model post-processes them, lse_n
    their logsumexp, s = ``label_smoothing``; items is ``num_items_in_batch`` where the caller gives
    it, else the number of labels (at least 1). The logits of the output are None. A call without
    labels, such as each step of ``generate``, is the model's own. Only ``model.forward`` of this
    instance changes; fusing the same model again with the same settings returns the same handle.

    Args:
        model: a decoder-only language model of transformers, or a PEFT model around one. LoRA on
            the LM head is part of the fused product.
        label_smoothing: in [0, 1). Smoothing towards the uniform distribution, as the
            ``label_smoothing_factor`` of ``Trainer`` (leave that one at 0: it takes the labels away
            before the model sees them).
        z_loss: >= 0. Weight of the squared logsumexp, averaged like the loss.
        budget_bytes, backend: as in ``linear_logprob``.
    Returns:
        ``FusedLMHead``, whose ``undo()`` gives the model its own forward back; also a context
        manager.
    Gradients: as the model's own loss, to every parameter.
    Raises:
        TypeError: not such a model.
        ValueError: a range; other settings than before.
        NotImplementedError: an architecture, head or adapter that cannot.
    Source: label smoothing as in transformers' LabelSmoother, z-loss as in Chowdhery et al. 2022,
        arXiv:2204.02311, section 5. Differs from the stock loss by: logits in fp32; a batch without
        a label costs 0, not NaN.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{_OP}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if not (z_loss >= 0 and math.isfinite(z_loss)):
        raise ValueError(f"{_OP}: z_loss must be a finite float >= 0, got {z_loss}")
    settings = FusedLossSettings(float(label_smoothing), float(z_loss), budget_bytes, backend)
    causal = causal_model(_OP, model)
    handle = vars(causal).get(_ATTRIBUTE)
    if handle is None:
        handle = FusedLMHead(causal)
    elif handle.settings not in (None, settings):
        raise ValueError(
            f"{_OP}: model must be fused with the settings it has, {handle.settings}, got "
            f"{settings}. Call undo() on the handle first."
        )
    handle.settings = settings
    return handle


class FusedLMHead:
    """The fused forward of one model, and the way back; ``settings`` is None once undone."""

    def __init__(self, model: PreTrainedModel) -> None:
        def forward(self: PreTrainedModel, *args: Any, **inputs: Any):
            return getattr(self, _ATTRIBUTE)(*args, **inputs)

        # generate() and Trainer read off the signature which arguments they may pass
        forward.__signature__ = inspect.signature(type(model).forward)
        self.settings: FusedLossSettings | None = None
        self._model = model
        self._forward = forward
        self._instance_forward = vars(model).get("forward")
        self._transform = logit_transform(
            model.config.get_text_config(), names_used(model, "__init__", "forward")
        )
        # both live on the model: a deepcopy of it has a handle of its own and calls itself
        setattr(model, _ATTRIBUTE, self)
        model.forward = types.MethodType(forward, model)

    def undo(self) -> None:
        """Give the model its own forward back; a second call does nothing.

        Where an engine has wrapped the fused forward meanwhile, that wrapper stays and everything
        below it is the model's own again.
        """
        self.settings = None
        attributes = vars(self._model)
        if attributes.get(_ATTRIBUTE) is not self:
            return
        if getattr(attributes.get("forward"), "__func__", None) is not self._forward:
            return
        delattr(self._model, "forward")
        if self._instance_forward is not None:
            self._model.forward = self._instance_forward
        delattr(self._model, _ATTRIBUTE)

    def __enter__(self) -> "FusedLMHead":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __call__(self, *args: Any, **inputs: Any):
        """Answer a call of the model: with its loss where there are labels, else as it would."""
        model = self._model
        bound = self._forward.__signature__.bind(model, *args, **inputs)
        given = _by_name(bound)
        if self.settings is None or not _has_labels(given):
            if self._instance_forward is not None:
                return self._instance_forward(*args, **inputs)
            return type(model).forward(model, *args, **inputs)
        kept = given.get("logits_to_keep")
        if kept is not None and not (isinstance(kept, int) and kept == 0):
            # never the data of a tensor
            got = kept if isinstance(kept, int) else type(kept).__name__
            raise ValueError(
                f"{_OP}: logits_to_keep must be 0 in a call with labels, got {got}. Rows without "
                "a label cost nothing."
            )
        return self._loss_output(given)

    def _loss_output(self, given: dict[str, Any]) -> CausalLMOutputWithPast | tuple:
        model = self._model
        config = model.config.get_text_config()
        decoder_inputs = {k: v for k, v in given.items() if k not in _NOT_FOR_DECODER}
        router_wanted = False
        parameter = self._forward.__signature__.parameters.get("output_router_logits")
        if parameter is not None:
            # JetMoe's default was False once, whatever its config
            router_wanted = given.get("output_router_logits", parameter.default)
            if router_wanted is None:
                router_wanted = config.output_router_logits
            decoder_inputs["output_router_logits"] = router_wanted
        states = decoder_of(model)(**decoder_inputs, use_cache=False, return_dict=True)
        loss = self._loss(states.last_hidden_state, given)
        output = CausalLMOutputWithPast
        extra = {}
        if router_wanted:
            output = MoeCausalLMOutputWithPast
            aux_loss = router_loss(model, states.router_logits, given.get("attention_mask"))
            if aux_loss is not None:
                loss = loss + router_coefficient(model) * aux_loss.to(loss.device)
            extra = {"aux_loss": aux_loss, "router_logits": states.router_logits}
        result = output(
            loss=loss,
            hidden_states=states.get("hidden_states"),
            attentions=states.get("attentions"),
            **extra,
        )
        as_dict = given.get("return_dict")
        if as_dict is None:
            as_dict = model.config.return_dict
        return result if as_dict else result.to_tuple()

    def _loss(self, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        settings = self.settings
        head = head_layers(_OP, self._model.get_output_embeddings())
        weight = head.linear.weight
        # layers may be spread over devices: everything meets where the head is
        hidden = hidden.to(weight.device)
        if not torch.is_autocast_enabled(weight.device.type):
            # some families keep a head of higher precision
            hidden = hidden.to(weight.dtype)
        ignored = given.get("ignore_index", -100)
        targets = given.get("shift_labels")
        if targets is None:
            targets = torch.nn.functional.pad(given["labels"], (0, 1), value=ignored)[..., 1:]
        targets = targets.to(weight.device)
        outputs = ["logps"]
        if settings.label_smoothing or settings.z_loss:
            outputs.append("logsumexp")
        if settings.label_smoothing:
            outputs.append("mean_logits")
        whole, bias, lora = head.whole(hidden)
        scored = linear_logprob(
            hidden,
            whole,
            targets,
            bias=bias,
            lora=lora,
            ignore_index=ignored,
            outputs=tuple(outputs),
            budget_bytes=settings.budget_bytes,
            backend=settings.backend,
            **self._transform,
        )
        # ignored positions read 0 in every output
        total = -scored.logps.sum()
        if settings.label_smoothing:
            uniform = (scored.logsumexp - scored.mean_logits).sum()
            total = (1.0 - settings.label_smoothing) * total + settings.label_smoothing * uniform
        if settings.z_loss:
            total = total + settings.z_loss * scored.logsumexp.square().sum()
        items = given.get("num_items_in_batch")
        if items is None:
            items = (targets != ignored).sum().clamp(min=1)
        elif isinstance(items, torch.Tensor):
            items = items.to(total.device).clamp(min=1)
        else:
            items = max(items, 1)
        return total / items


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return a call's arguments by name, without the model itself."""
    named = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = bound.signature.parameters[name].kind
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _has_labels(given: dict[str, Any]) -> bool:
    return given.get("labels") is not None or given.get("shift_labels") is not None
