"""``preference_loss`` against code nobody here wrote: TRL 1.16's trainers, Liger 0.8.5's losses."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from spo_kernels import linear_logprob, preference_loss
from spo_kernels.calls.loss_table import LOSS_TYPES

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


# TRL's name of a contrastive part, beside ours
CONTRASTIVE = {"sigmoid": "cpo", "hinge": "hinge", "ipo": "ipo", "simpo": "simpo", "tpo-l": "simpo"}


def make_logits(sides):
    """Ids ``[sides P, T]``, where they are tokens, where completion tokens, and logits of them.

    A row is a prompt of two tokens, a completion of 1 to 6 and padding, which has log-probs too.
    """
    P, T, V = 4, 8, 11
    generator = torch.Generator().manual_seed(9)
    ends = 2 + torch.randint(1, T - 1, (sides * P, 1), generator=generator)
    place = torch.arange(T)
    ids = torch.randint(0, V, (sides * P, T), generator=generator)
    logits = torch.randn(sides * P, T, V, generator=generator) * 2
    return ids, place < ends, (place >= 2) & (place < ends), logits


def logps_of(logits, ids, device):
    """The log-probs of ids 1, 2, ..., each from the logits before it."""
    logps = torch.log_softmax(logits[:, :-1], dim=-1)
    return logps.gather(2, ids[:, 1:, None]).squeeze(2).to(device)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_agrees_with_trl_tpo(backend, loss_type, alpha):
    """TRL's whole TPO loss: a contrastive part without a reference, and NLL of a gold response."""
    tpo_trainer = pytest.importorskip("trl.experimental.tpo.tpo_trainer")
    name, device = backend
    sides = ("chosen", "rejected", "response") if alpha else ("chosen", "rejected")
    ids, tokens, counted, logits = make_logits(len(sides))
    theirs = logits.clone().requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t),
        loss_type=loss_type,
        beta=0.4,
        label_smoothing=0.1,
        tpo_alpha=alpha,
        tpo_l_gamma=0.6,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": ids, "attention_mask": tokens, "completion_mask": counted.long()}
    expected = tpo_trainer.TPOTrainer._compute_loss(
        trainer, lambda **kwargs: SimpleNamespace(logits=theirs), inputs, return_outputs=False
    )
    expected.backward()

    ours = logits.clone().requires_grad_()
    given = {}
    for what, tensor in (("logps", logps_of(ours, ids, device)), ("mask", counted[:, 1:])):
        parts = tensor.to(device).chunk(len(sides))
        given |= {f"{side}_{what}": part for side, part in zip(sides, parts, strict=True)}
    out = preference_loss(
        **given,
        loss_type=[CONTRASTIVE[loss_type], "nll"][: len(sides) - 1],
        loss_weights=[1.0, alpha][: len(sides) - 1],
        beta=0.4,
        label_smoothing=0.1,
        simpo_gamma=0.6,
        backend=name,
    )
    out.losses.mean().backward()
    torch.testing.assert_close(out.losses.mean().cpu(), expected.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *(("cpo", {"loss_type": name}) for name in ("sigmoid", "hinge", "ipo", "simpo")),
        ("cpo", {"loss_type": "simpo", "alpha": 0.25}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
        ("orpo", {}),
    ],
    ids=str,
)
def test_agrees_with_trl_whole(backend, method, settings):
    """A whole CPO or ORPO step of TRL, from logits: its NLL is over other tokens in each."""
    module = pytest.importorskip(f"trl.experimental.{method}.{method}_trainer")
    name, device = backend
    ids, tokens, counted, logits = make_logits(2)
    # TRL pads the sides to one width by itself
    tokens[4:, 6:] = counted[4:, 6:] = False
    widths = {"chosen": slice(None), "rejected": slice(6)}
    batch = {}
    for side, rows in (("chosen", slice(4)), ("rejected", slice(4, 8))):
        part = rows, widths[side]
        batch[f"{side}_input_ids"] = ids[part]
        batch[f"{side}_attention_mask"] = tokens[part].long()
        batch[f"{side}_labels"] = ids[part].masked_fill(~counted[part], -100)
    theirs = logits.clone().requires_grad_()
    # a trainer without its __init__, which wants a model and a dataset
    kind = getattr(module, f"{method.upper()}Trainer")
    trainer = kind.__new__(kind)
    defaults = {"loss_type": "", "alpha": 0.0, "cpo_alpha": 0.7}
    vars(trainer).update(
        **{**defaults, **settings},
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        aux_loss_enabled=False,
        beta=0.4,
        simpo_gamma=0.6,
        label_smoothing=0.1,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda t: t.detach()
        ),
    )
    expected, _ = trainer.get_batch_loss_metrics(
        lambda ids, **kwargs: SimpleNamespace(logits=theirs), batch
    )
    expected.backward()

    ours = logits.clone().requires_grad_()
    chosen, rejected = logps_of(ours, ids, device).chunk(2)
    masks = counted[:, 1:].to(device).chunk(2)
    given = {"chosen_mask": masks[0], "rejected_mask": masks[1]}
    if method == "orpo":
        names, weights = ["orpo", "nll"], [1.0, 1.0]
        given |= {"response_logps": chosen, "response_mask": tokens[:4, 1:].to(device)}
    else:
        own = "alphapo" if trainer.alpha else CONTRASTIVE[trainer.loss_type]
        names, weights = [own, "sft"], [1.0, trainer.cpo_alpha]
    out = preference_loss(
        chosen,
        rejected,
        **given,
        loss_type=names,
        loss_weights=weights,
        beta=0.4,
        label_smoothing=0.1,
        simpo_gamma=0.6,
        alphapo_alpha=trainer.alpha,
        backend=name,
    )
    out.losses.mean().backward()
    torch.testing.assert_close(out.losses.mean().cpu(), expected.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


# our mix, Liger's loss, its settings beside ours
LIGER = [
    # the other two are settings of Liger's, below
    *(
        ((name,), "dpo", {"loss_type": name})
        for name in DPO_TYPES
        if name not in ("sft", "sigmoid_norm")
    ),
    (("sigmoid_norm",), "dpo", {"average_log_prob": True}),
    (("hinge", "sft"), "dpo", {"loss_type": "hinge", "compute_nll_loss": True, "alpha": 0.7}),
    (("cpo", "sft"), "cpo", {"alpha": 0.7}),
    (("simpo", "sft"), "simpo", {"alpha": 0.7, "gamma": 0.6}),
    (("orpo", "nll"), "orpo", {}),
]
LIGER_NAMES = {"dpo": "DPO", "cpo": "CPO", "simpo": "SimPO", "orpo": "ORPO"}


@pytest.mark.parametrize(("names", "method", "settings"), LIGER, ids=str)
def test_agrees_with_liger(backend, names, method, settings):
    """Liger's chunked losses on hidden states, against our log-probs of them through our loss."""
    module = pytest.importorskip(f"liger_kernel.chunked_loss.{method}_loss")
    kind = getattr(module, f"LigerFusedLinear{LIGER_NAMES[method]}Loss")
    loss_type = settings.get("loss_type")
    if loss_type and loss_type not in kind._SUPPORTED_LOSS_TYPES:
        pytest.skip(f"Liger's DPO has no loss_type={loss_type!r}")
    name, device = backend
    P, T, H, V = 4, 6, 8, 13
    generator = torch.Generator().manual_seed(7)
    hidden, ref_hidden = torch.randn(2, 2 * P, T, H, generator=generator)
    weight, ref_weight = torch.randn(2, V, H, generator=generator)
    bias = torch.randn(V, generator=generator)
    whole = torch.randint(0, V, (2 * P, T), generator=generator)
    whole[::3, 4:] = -100
    # the prompt, which ORPO's NLL counts
    labels = whole.masked_fill(torch.arange(T) < torch.arange(2 * P)[:, None] % 3, -100)
    shared = {"beta": 0.4} if method == "orpo" else {"beta": 0.4, "label_smoothing": 0.1}
    op = kind(**shared, **settings, compiled=False, chunk_size=2)
    theirs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    more = {"nll_target": whole} if method == "orpo" else {}
    if method == "dpo":
        more = {"ref_input": ref_hidden, "ref_weight": ref_weight}
    expected, aux = op(theirs[1], theirs[0], labels.clone(), theirs[2], **more)
    (3.0 * expected).backward()

    def scored(states, head, labels, bias=None):
        tensors = [None if t is None else t.to(device) for t in (states, head, labels, bias)]
        return linear_logprob(*tensors[:3], bias=tensors[3], backend=name).logps

    ours = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    chosen, rejected = scored(*ours[:2], labels, ours[2]).chunk(2)
    masks = (labels != -100).to(device).chunk(2)
    given = {"chosen_mask": masks[0], "rejected_mask": masks[1]}
    if method == "dpo":
        refs = scored(ref_hidden, ref_weight, labels).chunk(2)
        given |= {"ref_chosen_logps": refs[0], "ref_rejected_logps": refs[1]}
    if method == "orpo":
        response = scored(ours[0][:P], ours[1], whole[:P], ours[2])
        given |= {"response_logps": response, "response_mask": (whole[:P] != -100).to(device)}
    out = preference_loss(
        chosen,
        rejected,
        **given,
        loss_type=names,
        loss_weights=[1.0, settings.get("alpha", 1.0)][: len(names)],
        beta=0.4,
        label_smoothing=0.1,
        simpo_gamma=0.6,
        backend=name,
    )
    (3.0 * out.losses.mean()).backward()
    torch.testing.assert_close(out.losses.mean().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=1e-5)


def test_every_type_of_a_peer_is_here():
    """A row of the table names a peer exactly where a test above compares it with that peer."""

    def named(peer):
        return {row.name for row in LOSS_TYPES if peer in row.peers}

    assert named("TRL") == {*DPO_TYPES, "cpo", "simpo", "alphapo", "orpo", "nll"}
    dpo_loss = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")
    supported = dpo_loss.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES
    mixes = [names for names, _, more in LIGER if more.get("loss_type", "sigmoid") in supported]
    assert named("Liger") == {name for names in mixes for name in names}
