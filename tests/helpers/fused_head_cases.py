"""Tiny models of every kind of LM head, and a batch for them."""

import copy

import torch
from transformers import AutoModelForCausalLM
from transformers.models import cohere, gemma2, granite, llama, mixtral

from spo_kernels.integrations.lm_head.fused_head import FusedHeadSettings

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": llama.LlamaConfig(**SHAPE),
    "llama_tied": llama.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "softcap": gemma2.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.5),
    "logit_scale": cohere.CohereConfig(**SHAPE, logit_scale=0.25),
    "logits_scaling": granite.GraniteConfig(**SHAPE, logits_scaling=4.0),
    "experts": mixtral.MixtralConfig(
        **SHAPE, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1
    ),
}
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
SETTINGS = FusedHeadSettings()


def make_model(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    for parameter in model.parameters():
        # peaked enough for the softcap to matter
        parameter.data.mul_(3.0)
    return model


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(torch.arange(9) < 3, -100).masked_fill(mask == 0, -100)
    labels[3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
