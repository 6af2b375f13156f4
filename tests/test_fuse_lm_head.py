"""``fuse_lm_head`` against the model's own loss: architectures, Trainer, LoRA, undo, memory."""

import copy
import inspect
import math
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from spo_kernels.integrations import fuse_lm_head

V, B, T = 97, 3, 9
SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.3,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 24}
LATENT = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {"state_size": 4, "time_step_rank": 2}
CHANGES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {},
    "ministral": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "vaultgemma": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "nanochat": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "recurrent_gemma": {"lru_width": 16, "logits_soft_cap": 1.5, "num_hidden_layers": 3},
    "xlstm": {"num_heads": 2, "output_logit_soft_cap": 1.5, "chunk_size": 8},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "head_dim": 8},
    "granite": {"logits_scaling": 3.0},
    "minicpm3": {**LATENT, "dim_model_base": 4},
    "falcon_h1": {
        "lm_head_multiplier": 0.4,
        "head_dim": 8,
        "mamba_d_ssm": 16,
        "mamba_n_heads": 2,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "mamba_chunk_size": 4,
    },
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon": {},
    "phi": {"num_key_value_heads": 2},
    "phi3": {},
    "gpt2": GPT2,
    "gptj": {**GPT2, "rotary_dim": 4},
    "gpt_bigcode": GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0.0},
    "bloom": {"n_layer": 2, "n_head": 2, "hidden_dropout": 0.0},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32},
    "stablelm": {},
    "starcoder2": {"embedding_dropout": 0.0},
    "olmo": {},
    "olmo2": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "nemotron": {},
    "smollm3": {},
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 8},
    "olmoe": {**EXPERTS, "num_experts": 4},
    "granitemoe": {**EXPERTS, "num_local_experts": 4, "logits_scaling": 3.0},
    "jetmoe": {**EXPERTS, "num_local_experts": 4, "kv_channels": 8, "aux_loss_coef": 0.3},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "head_dim": 8},
    "phimoe": {**EXPERTS, "num_local_experts": 4},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "head_dim": 8},
}
TRANSFORMED = {
    "cohere": ("logit_scale", 1.0),
    "gemma2": ("final_logit_softcapping", None),
    "granite": ("logits_scaling", 1.0),
}


def make_model(name: str = "llama", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SHAPE, **CHANGES[name], **changes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # peaked enough for softcaps and scales to matter
            parameter.data.mul_(3.0)
    return model


def make_batch(*, seed: int = 1, padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (B, T), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    labels = ids.masked_fill(torch.arange(T) < 3, -100).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(ours, theirs, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare two losses and all gradients of two models."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found, expected = gradients(ours, found), gradients(theirs, expected)
    largest = max(grad.abs().max().item() for grad in expected.values() if grad is not None)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
        else:
            # some gradients, such as a key bias's, are zero but for rounding
            torch.testing.assert_close(
                found[name], grad, atol=1e-5 * largest, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", CHANGES)
def test_architectures(name):
    theirs = make_model(name)
    ours = copy.deepcopy(theirs)
    fuse_lm_head(ours)
    batch = make_batch()
    for extra in ({}, {"num_items_in_batch": torch.tensor(40)}):
        found, expected = ours(**batch, **extra), theirs(**batch, **extra)
        assert found.logits is None and expected.logits is not None
        assert_same(ours, theirs, found.loss, expected.loss)
    if "output_router_logits" in CHANGES[name]:
        torch.testing.assert_close(found.aux_loss, expected.aux_loss)
        assert found.aux_loss > 0
        plain = ours(**batch, output_router_logits=False)
        assert plain.loss < found.loss + 1e9 and "aux_loss" not in plain
    if name in TRANSFORMED:
        # the transform is not a no-op in this test
        attribute, neutral = TRANSFORMED[name]
        setattr(theirs.config, attribute, neutral)
        if name == "cohere":
            theirs.logit_scale = neutral
        assert not torch.isclose(theirs(**batch, **extra).loss, expected.loss, rtol=1e-3)
