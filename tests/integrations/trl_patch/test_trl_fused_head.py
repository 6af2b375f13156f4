"""The fused head against TRL's own: architectures, experts, empty batches, sharded heads."""

import types

import pytest
import torch
from trl.trainer import dpo_trainer
from trl.trainer import utils as trl_utils

from spo_kernels.integrations.lm_head.fused_head import (
    fused_heads_installed_in,
    install_fused_head,
)
from spo_kernels.integrations.spo.degree_head import DegreeHead
from tests.helpers.fused_head_cases import CONFIGS, OUTPUTS, SETTINGS, make_batch, make_model


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_trl(name):
    ours, theirs = make_model(name), make_model(name)
    install_fused_head(ours, OUTPUTS, settings=SETTINGS)
    trl_utils.add_fused_lm_head(theirs, outputs=OUTPUTS)
    batch = make_batch()
    # DPOTrainer itself asks for the router's logits where there is a router
    asked = {"output_router_logits": True} if name == "experts" else {}
    outputs = [model(**batch, **asked, fused_lm_head=True) for model in (ours, theirs)]
    assert isinstance(outputs[0], trl_utils.FusedCausalLMOutput)
    for field in (*OUTPUTS, "aux_loss"):
        found, expected = (getattr(output, field) for output in outputs)
        if expected is None:
            assert found is None, field
        else:
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5, msg=field)
    for output in outputs:
        loss = -output.log_probs.sum() + output.entropy.sum()
        (loss if output.aux_loss is None else loss + output.aux_loss).backward()
    for (parameter_name, found), expected in zip(
        ours.named_parameters(), theirs.parameters(), strict=True
    ):
        torch.testing.assert_close(
            found.grad, expected.grad, atol=2e-5, rtol=1e-3, msg=parameter_name
        )
    # an engine's wrapping and unwrapping leaves a forward that still works
    ours.forward = types.MethodType(ours.forward.__func__, ours)
    # any other call is the model's own
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(ours(**plain).logits, theirs(**plain).logits)


def test_views_are_not_scored():
    """Rows past the labels' take part in the degree loss only, not in the router loss either."""
    model = make_model("experts")
    model.spo_degree_head = DegreeHead(32, 3)
    torch.nn.init.normal_(model.spo_degree_head.weight)
    install_fused_head(model, OUTPUTS, settings=SETTINGS)
    batch = make_batch()
    alone = model(**batch, output_router_logits=True, fused_lm_head=True)
    wide = {name: torch.cat((batch[name], batch[name][:2])) for name in batch if name != "labels"}
    degree_inputs = {
        "removal_levels": torch.tensor([1, 0, 2, 0, 0, 0], dtype=torch.int8),
        "segment_offsets": torch.tensor([0, 2, 4, 5, 6]),
        "view_order": torch.tensor([0, 4, 1, 5, 2, 3]),
        "completion_mask": wide["attention_mask"],
    }
    output = model(
        **wide,
        labels=batch["labels"],
        output_router_logits=True,
        fused_lm_head=True,
        degree_inputs=degree_inputs,
    )
    for field in ("log_probs", "entropy", "aux_loss"):
        torch.testing.assert_close(getattr(output, field), getattr(alone, field))
    assert output.degree_counted_views.tolist() == [2, 2, 0, 0]
    assert output.degree_view_mask.tolist()[:2] == [[True, True, False], [True, False, True]]
    assert alone.degree_losses is None


def test_nothing_to_score():
    """A batch without labels and key content gives zeros that are connected to every parameter."""
    model = make_model("llama")
    model.spo_degree_head = DegreeHead(32, 3)
    install_fused_head(model, settings=SETTINGS)
    batch = make_batch()
    batch["labels"][:] = -100
    degree_inputs = {
        "removal_levels": torch.full((4, 9), -1, dtype=torch.int8),
        "segment_offsets": torch.arange(5) * 9,
    }
    output = model(**batch, fused_lm_head=True, degree_inputs=degree_inputs, scored_rows=0)
    loss = output.log_probs.sum() + output.degree_losses.sum()
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_installed_and_undone():
    original = dpo_trainer.add_fused_lm_head
    with pytest.raises(KeyError), fused_heads_installed_in(dpo_trainer, SETTINGS):
        assert dpo_trainer.add_fused_lm_head is not original
        raise KeyError
    assert dpo_trainer.add_fused_lm_head is original
