"""Refusals of the SPO trainers before the first step: models, settings, engines, budgets."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import ProcessorMixin, Trainer

from spo_kernels import plan_linear_logprob
from spo_kernels.integrations.lm_head.fused_head import FusedHeadSettings
from spo_kernels.integrations.spo.config import SPOSettings


def refuse_settings(
    op: str,
    args: SPOSettings,
    optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None],
) -> None:
    """Refuse what the degree loss cannot run with."""
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            f"{op}: accelerator_config.dispatch_batches must be off, since dispatching cuts "
            "every tensor of a batch to one length, got True"
        )
    if optimizers[0] is not None and optimizers[1] is not None:
        raise ValueError(
            f"{op}: optimizers must leave the scheduler to the trainer, which adds the degree "
            "head's group to the optimizer first, got both. Pass (optimizer, None)."
        )
    if args.kernel_backend == "triton" and args.device.type != "cuda":
        raise ValueError(
            f"{type(args).__name__}: kernel_backend='triton' must run on a CUDA device, got "
            f"{args.device.type}. Use 'auto' or 'torch'."
        )


def refuse_unsupported(
    op: str, model: Any, processing_class: Any, train_dataset: Any, peft_config: Any
) -> None:
    """Refuse encoder-decoders, vision-language models and prompt learning where one is seen."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{op}: encoder-decoder models are not supported: the fused LM head and the views need "
            "prompt and response in one sequence. Use a decoder-only model."
        )
    example = {} if train_dataset is None else next(iter(train_dataset), {})
    if (
        isinstance(processing_class, ProcessorMixin)
        or hasattr(config, "vision_config")
        or not {"image", "images"}.isdisjoint(example)
    ):
        raise NotImplementedError(
            f"{op}: vision-language models are not supported: processors expand images into "
            "tokens without character offsets, so key content cannot be placed on the tokens."
        )
    configs = [peft_config] if peft_config is not None else []
    if isinstance(model, nn.Module) and is_peft_model(model):
        configs += model.peft_config.values()
    for one in configs:
        if one.is_prompt_learning:
            raise NotImplementedError(
                f"{op}: {one.peft_type.value} is not supported: it puts virtual tokens "
                "before the text, so hidden states and removal levels would not line up. Use LoRA."
            )


def refuse_engine(op: str, trainer: Trainer) -> None:
    """Refuse the ways of sharding in which head or views would come apart."""
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version < 2:
        raise NotImplementedError(
            f"{op}: fsdp_version must be 2, got 1, which flattens the degree head into "
            "the model's parameters so that it cannot be saved apart."
        )
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and max(parallelism.cp_size, parallelism.sp_size) > 1:
        raise NotImplementedError(
            f"{op}: context and sequence parallelism must be off: a response's views and "
            "its next-token labels need the whole sequence."
        )


def check_budget(args: SPOSettings, settings: FusedHeadSettings, lm_head: nn.Module) -> None:
    """Refuse a budget in which not even one row fits, before the first step."""
    if settings.budget_bytes is None:
        return
    device = "cpu"
    if args.device.type == "cuda" and settings.backend != "torch":
        major, minor = torch.cuda.get_device_capability(args.device)
        device = f"cuda:sm_{major}{minor}"
    question = {
        "rows": 1,
        "hidden_size": lm_head.in_features,
        "vocab_size": lm_head.out_features,
        "dtype": lm_head.weight.dtype,
        "needs_grad": ("hidden", "weight") if lm_head.weight.requires_grad else ("hidden",),
        "outputs": ("logps", "entropy", "mean_logits", "is_top1"),
        "device": device,
    }
    try:
        plan_linear_logprob(**question, budget_bytes=settings.budget_bytes)
    except ValueError as error:
        raise ValueError(
            f"{type(args).__name__}: logprob_budget_mib must hold at least one row of log-probs, "
            f"got {args.logprob_budget_mib} MiB ({error})"
        ) from error
