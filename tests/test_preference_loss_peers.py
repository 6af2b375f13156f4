"""``preference_loss`` against code nobody here wrote: TRL 1.16's own loss functions."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from spo_kernels import preference_loss
from spo_kernels.loss_table import LOSS_TYPES

DPO_TYPES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero "
    "apo_down discopop sft sigmoid_norm"
).split()
# without discopop: 0 times an infinite exp(-m) makes TRL's NaN at these margins
DIVERGENT = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "sft"]
WEIGHTS = ("chosen_log_sum_sq_probs", "rejected_log_sum_sq_probs")
CASES = [(name, {}) for name in DPO_TYPES]
CASES += [(["sigmoid", "sft"], {}), (DPO_TYPES, {}), (["sigmoid", "sft"], {"ld_alpha": 0.4})]
CASES += [
    (DIVERGENT, {"f_divergence_type": kind})
    for kind in ("forward_kl", "js_divergence", "alpha_divergence")
]
# TRL weighs in place, which a relu and an expanded term do not survive, and refuses ranks
WEIGHED = [name for name in DPO_TYPES if name not in ("hinge", "sft", "aot", "aot_unpaired")]
CASES += [(WEIGHED, {"use_weighting": True})]


@pytest.mark.parametrize(("loss_type", "settings"), CASES, ids=str)
def test_agrees_with_trl_dpo(backend, loss_type, settings):
    """The batch loss and its gradient are those of TRL's own DPOTrainer on the same log-probs."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    name, device = backend
    P, T = 6, 9
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    weights = [1.0 + 0.3 * i for i in range(len(names))]
    use_weighting = "use_weighting" in settings
    settings = {k: v for k, v in settings.items() if k != "use_weighting"}
    generator = torch.Generator().manual_seed(5)
    mask = torch.zeros(2 * P, T, dtype=torch.int64)
    for row, length in enumerate(torch.randint(1, T - 1, (2 * P,), generator=generator).tolist()):
        mask[row, T - length :] = 1
    # TRL's mask covers the ids, whose log-probs start one position later
    logps = -torch.rand(2 * P, T - 1, generator=generator) * 3 * mask[:, 1:]
    refs = -torch.rand(2, P, generator=generator) * 3 * mask.sum(1).view(2, P)

    leaf = logps.clone().requires_grad_()
    zeros = torch.zeros_like(logps)
    squares = -torch.rand(logps.shape, generator=generator) * mask[:, 1:]
    model_output = SimpleNamespace(
        log_probs=leaf,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=squares,
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t
        ),
        aux_loss_enabled=False,
        ld_alpha=settings.get("ld_alpha"),
        label_smoothing=0.1,
        args=SimpleNamespace(discopop_tau=0.05),
        f_alpha_divergence_coef=0.5,
        precompute_ref_logps=True,
        f_divergence_type=settings.get("f_divergence_type", "reverse_kl"),
        loss_types=names,
        loss_weights=weights,
        beta=0.1,
        use_weighting=use_weighting,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": refs[0],
        "ref_rejected_logps": refs[1],
    }
    expected = dpo_trainer.DPOTrainer._compute_loss(
        trainer, lambda **kwargs: model_output, inputs, return_outputs=False
    )
    expected.backward()

    ours = logps.to(device).requires_grad_()
    chosen, rejected = ours.chunk(2)
    counted = mask[:, 1:].to(device).chunk(2)
    inputs = {"chosen_mask": counted[0], "rejected_mask": counted[1]}
    if use_weighting:
        inputs |= dict(zip(WEIGHTS, squares.to(device).chunk(2), strict=True))
    out = preference_loss(
        chosen,
        rejected,
        *refs.to(device),
        loss_type=names,
        loss_weights=weights,
        label_smoothing=0.1,
        **inputs,
        **settings,
        backend=name,
    )
    out.losses.mean().backward()
    torch.testing.assert_close(out.losses.mean().cpu(), expected.detach(), rtol=2e-6, atol=1e-6)
    # TRL sums every position, and its fused head gives ignored ones no gradient
    wanted = leaf.grad * mask[:, 1:]
    torch.testing.assert_close(ours.grad.cpu(), wanted, rtol=1e-5, atol=1e-7)
    accuracy = (out.chosen_rewards > out.rejected_rewards).float().mean().item()
    assert trainer._metrics["train"]["rewards/accuracies"] == [pytest.approx(accuracy)]


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_agrees_with_trl_cpo(backend, loss_type, alpha):
    """CPO, SimPO and AlphaPO: TRL's ``cpo_loss`` on sums or, where it averages, on means."""
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    if alpha and loss_type != "simpo":
        pytest.skip("AlphaPO is SimPO with a bent reward")
    name, device = backend
    averages = loss_type in ("ipo", "simpo")
    lengths = torch.tensor([3, 7, 5, 9]), torch.tensor([4, 4, 8, 2])
    sums = [-torch.rand(4, generator=torch.Generator().manual_seed(i)) * 9 for i in (1, 2)]
    theirs = [t.clone().requires_grad_() for t in sums]
    given = [t / n if averages else t for t, n in zip(theirs, lengths, strict=True)]
    trainer = SimpleNamespace(
        alpha=alpha,
        beta=0.7,
        simpo_gamma=0.4,
        label_smoothing=0.1,
        loss_type=loss_type,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    expected, _, _ = cpo_trainer.CPOTrainer.cpo_loss(trainer, *given)
    expected.mean().backward()
    ours = [t.to(device).clone().requires_grad_() for t in sums]
    own = {"sigmoid": "cpo", "simpo": "alphapo" if alpha else "simpo"}
    out = preference_loss(
        *ours,
        loss_type=own.get(loss_type, loss_type),
        beta=0.7,
        simpo_gamma=0.4,
        alphapo_alpha=alpha,
        label_smoothing=0.1,
        chosen_lengths=lengths[0].to(device),
        rejected_lengths=lengths[1].to(device),
        backend=name,
    )
    out.losses.mean().backward()
    torch.testing.assert_close(out.losses.cpu(), expected.detach(), rtol=2e-6, atol=1e-6)
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.cpu(), their.grad, rtol=1e-5, atol=1e-7)


def test_agrees_with_trl_orpo(backend):
    """The odds-ratio part of ORPO on mean log-probs; TRL returns its negative."""
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    name, device = backend
    generator = torch.Generator().manual_seed(3)
    sums = -torch.rand(2, 6, generator=generator) * 9 - 0.01
    theirs = sums.clone().requires_grad_()
    length = torch.full((6,), 4)
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=torch.device("cpu")))
    losses, *_ = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, *(theirs / 4))
    (-losses).mean().backward()
    ours = sums.to(device).requires_grad_()
    counts = {f"{side}_lengths": length.to(device) for side in ("chosen", "rejected")}
    out = preference_loss(*ours, loss_type="orpo", beta=0.3, **counts, backend=name)
    out.losses.mean().backward()
    torch.testing.assert_close(out.losses.cpu(), -losses.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-5, atol=1e-7)


def test_every_type_of_trl_is_here():
    """The table says TRL has them; its DPO types are all among its rows."""
    assert set(DPO_TYPES) <= {row.name for row in LOSS_TYPES if "TRL" in row.peers}
