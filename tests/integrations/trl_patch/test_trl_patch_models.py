"""The fused head of ``patch_trl`` against each model's own forward: what models differ in."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereForCausalLM,
    LlamaForCausalLM,
    MixtralForCausalLM,
)
from trl.trainer import utils as trl_utils

from spo_kernels.integrations.lm_head import fused_head
from spo_kernels.integrations.trl_patch import init
from tests.helpers.fused_head_cases import (
    CONFIGS,
    SETTINGS,
    make_batch,
    make_model,
)


def model_as_decoder(name: str, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 61}
    config = AutoConfig.for_model(name, **{**sizes, "intermediate_size": 24, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


MPT = {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 16, "logit_scale": 0.3}
ROUTED = {"num_local_experts": 4, "output_router_logits": True}


@pytest.mark.parametrize(
    ("name", "changes", "fused"),
    [
        # a setting that its forward ignores
        ("mpt", MPT, True),
        # base_model is the model itself
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 24}, True),
        # the number of experts goes by another name in its config
        ("phimoe", ROUTED, True),
        # a dense layer between decoder and vocabulary
        ("roberta", {"is_decoder": True}, False),
    ],
)
def test_scores_as_the_models_own_forward(name, changes, fused):
    plain, ours = model_as_decoder(name, **changes), model_as_decoder(name, **changes)
    assert init.install_on(ours, ("position_mean_logits",), SETTINGS) == fused
    if not fused:
        assert "forward" not in vars(ours)
        return
    batch = make_batch()
    labels = batch.pop("labels")
    expected = plain(**batch)
    output = ours(**batch, labels=labels, fused_lm_head="log_probs,position_mean_logits")
    assert (output.aux_loss is None) == ("output_router_logits" not in changes)
    if output.aux_loss is not None:
        torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    torch.testing.assert_close(output.position_mean_logits, expected.logits.mean(-1))
    mask, targets = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    logp = expected.logits[:, :-1].float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(output.log_probs, logp * mask, atol=1e-5, rtol=1e-5)


def test_settings_of_a_forward_that_is_extended():
    """A subclass calls the forward that scales or balances; another one reads its cap once."""

    class Extended(CohereForCausalLM):
        def forward(self, *args, **inputs):
            return super().forward(*args, **inputs)

    class ExtendedExperts(MixtralForCausalLM):
        def forward(self, *args, **inputs):
            return super().forward(*args, **inputs)

    class Capped(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.cap = config.final_logit_softcapping

        def forward(self, *args, labels, **inputs):
            logits = super().forward(*args, **inputs).logits
            logits = self.cap * torch.tanh(logits / self.cap)
            return SimpleNamespace(loss=self.loss_function(logits, labels, logits.shape[-1]))

    configs = copy.deepcopy(CONFIGS)
    configs["llama"].final_logit_softcapping = 0.1
    batch = make_batch()
    for kind, name in ((Extended, "logit_scale"), (ExtendedExperts, "experts"), (Capped, "llama")):
        torch.manual_seed(0)
        model = kind(configs[name])
        expected = model(**batch)
        fused_head.install_fused_head(model, settings=SETTINGS)
        output = model(**batch, fused_lm_head=True)
        torch.testing.assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("cast_lm_head_to_fp32", [False, True])
@pytest.mark.parametrize("head", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("body", [torch.bfloat16, torch.float32])
def test_a_head_of_another_dtype(body, head, cast_lm_head_to_fp32):
    """It is scored in the dtype of the hidden states, as TRL's fused head does."""
    outputs = []
    for install in (
        trl_utils.add_fused_lm_head,
        functools.partial(fused_head.install_fused_head, settings=SETTINGS),
    ):
        model = make_model("llama").to(body)
        model.lm_head.to(head)
        install(model, cast_lm_head_to_fp32=cast_lm_head_to_fp32)
        outputs.append(model(**make_batch(), fused_lm_head=True).log_probs)
    exact = body == torch.float32 or cast_lm_head_to_fp32
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5 if exact else 5e-3, rtol=1e-5)
