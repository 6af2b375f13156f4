"""Which models ``fuse_lm_head`` can take, and how they balance their experts.

A model is taken apart by its structure and by the names its forward uses, not by a list of
architectures: a decoder, a head right beside it, transformers' own loss of the logits.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_peft_available

from spo_kernels.integrations.lm_head.lm_head import head_layers

# settings under which a family's loss is more than the cross-entropy of its transformed logits
_BEYOND_CROSS_ENTROPY = ("z_loss_coefficient", "unpadded_vocab_size")

_BALANCE_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def causal_model(op: str, model: torch.nn.Module) -> PreTrainedModel:
    """Return the causal language model in ``model``, refusing what has a loss of another form."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            model = model.get_base_model()
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{op}: model must be a transformers model or a PEFT model of one, got {name}"
        )

    def refuse(requirement: str, got: str = name) -> None:
        raise NotImplementedError(f"{op}: model must {requirement}, got {got}")

    if model.config.is_encoder_decoder:
        refuse("be decoder-only")
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    known = {name for name in names if "ConditionalGeneration" not in name}
    if not known & {kind.__name__ for kind in type(model).__mro__}:
        refuse("be a text-only causal language model of transformers")
    # BART's relatives do not shift their labels, ProphetNet predicts several tokens, ...
    if "loss_function" not in names_used(model, "forward"):
        refuse("take its loss from loss_function", f"a loss of its own in {name}")
    if model.loss_function is not ForCausalLMLoss:
        loss = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
        refuse("have ForCausalLMLoss as its loss_function", loss)
    for setting in _BEYOND_CROSS_ENTROPY:
        if value := getattr(model.config.get_text_config(), setting, None):
            refuse(f"leave config.{setting} unset", value)
    balance = _balance_function(model)
    if balance is not None and list(inspect.signature(balance).parameters) != _BALANCE_ARGUMENTS:
        refuse("balance its experts by their logits alone")
    head = model.get_output_embeddings()
    if head is None:
        refuse("have an LM head")
    if not is_decoder_and_head(model):
        parts = ", ".join(name for name, _ in model.named_children())
        refuse("consist of a decoder and an LM head only", f"{name} of {parts}")
    head_layers(op, head)
    return model


def router_loss(
    model: PreTrainedModel,
    router_logits: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return the balancing loss that this family computes, None for one that has none."""
    balance = _balance_function(model)
    # DeepSeek-V3's relatives balance their experts with a bias instead
    if balance is None:
        return None
    # vision-language models read their config each time
    held = (model, model.config.get_text_config())
    experts, per_token = (
        next(getattr(owner, name) for owner in held if hasattr(owner, name))
        for name in ("num_experts", "num_experts_per_tok")
    )
    return balance(router_logits, experts, per_token, attention_mask)


def _balance_function(model: PreTrainedModel) -> Callable[..., torch.Tensor] | None:
    """Return the function that this family's forward calls, each has a version of its own."""
    name = "load_balancing_loss_func"
    forwards = _methods(model, "forward")
    users = (forward for forward in forwards if name in forward.__code__.co_names)
    return next((forward.__globals__[name] for forward in users), None)


def router_coefficient(model: PreTrainedModel) -> float:
    # JetMoe's name is the shorter one
    name = "aux_loss_coef" if model.config.model_type == "jetmoe" else "router_aux_loss_coef"
    return getattr(model, name)


def is_decoder_and_head(model: PreTrainedModel) -> bool:
    """Whether nothing is between decoder and vocabulary, such as BERT's relatives' dense layer."""
    parts = list(model.children())
    return len(parts) == 2 and model.get_output_embeddings() in parts


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """Return what computes the hidden states: beside the head there may be modules of others."""
    if not is_decoder_and_head(model):
        return model.base_model
    # Llama 4's base_model is the model itself
    head = model.get_output_embeddings()
    [decoder] = (part for part in model.children() if part is not head)
    return decoder


def names_used(model: PreTrainedModel, *methods: str) -> set[str]:
    """Return every name and string in these methods of the model's class."""
    found: set[str] = set()
    for method in methods:
        for code in (function.__code__ for function in _methods(model, method)):
            found.update(code.co_names, (c for c in code.co_consts if isinstance(c, str)))
    return found


def _methods(model: PreTrainedModel, name: str) -> list[Callable[..., Any]]:
    """Return a method of the model's class, and those it may call of the classes it extends."""
    own = (inspect.unwrap(vars(kind).get(name)) for kind in type(model).__mro__)
    return [method for method in own if inspect.isfunction(method)]
