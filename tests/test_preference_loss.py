"""``preference_loss``: both backends against the fp64 reference, TRL's own loss, and the faults."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import assert_within_budget
from torch.utils.checkpoint import checkpoint

import spo_kernels
from spo_kernels import preference_loss
from spo_kernels.loss_table import LOSS_TYPE_NAMES, LOSS_TYPES
from spo_kernels.reference_losses import preference_loss_reference

BLOCK_P = 128
MIXES = [
    *((name, None) for name in LOSS_TYPE_NAMES),
    (list(LOSS_TYPE_NAMES), [0.5 + i for i in range(len(LOSS_TYPE_NAMES))]),
]
pair_counts = st.one_of(
    st.sampled_from([1, BLOCK_P - 1, BLOCK_P, BLOCK_P + 1, 2 * BLOCK_P + 3]), st.integers(0, 40)
)


def make_pairs(P, *, dtype=torch.float32, seed=0):
    """Random log-probs of whole completions and their lengths, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    base = -100.0 * torch.rand(2, P, generator=generator)
    moved = base + 8.0 * torch.randn(2, P, generator=generator)
    tensors = {
        "chosen_logps": moved[0].to(dtype),
        "rejected_logps": moved[1].to(dtype),
        "ref_chosen_logps": base[0].to(dtype),
        "ref_rejected_logps": base[1].to(dtype),
    }
    lengths = torch.randint(0, 60, (2, P), generator=generator)
    return tensors, {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}


def run(call, tensors, upstream, **settings):
    """Return the outputs and the policy's gradients under ``upstream``, by name."""
    leaves = {
        name: t.clone().requires_grad_(not name.startswith("ref")) for name, t in tensors.items()
    }
    out = call(**leaves, **settings)
    out = out if isinstance(out, dict) else out._asdict()
    out["losses"].backward(upstream.to(out["losses"].device, out["losses"].dtype))
    grads = {f"grad_{n}": t.grad for n, t in leaves.items() if not n.startswith("ref")}
    return {**out, **grads}


def compare(backend, tensors, lengths, upstream, **settings):
    """Hold every output and gradient of ``backend`` to the budget."""
    name, device = backend
    oracle = run(
        preference_loss_reference,
        {n: t.double() for n, t in tensors.items()},
        upstream.double(),
        **lengths,
        **settings,
    )
    eager = run(preference_loss_reference, tensors, upstream, **lengths, **settings)
    actual = run(
        preference_loss,
        {n: t.to(device) for n, t in tensors.items()},
        upstream,
        **{n: t.to(device) for n, t in lengths.items()},
        **settings,
        backend=name,
    )
    for field, value in actual.items():
        label = f"preference_loss[{name}].{field} {settings}"
        assert_within_budget(label, value.cpu(), eager[field], oracle[field])
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("loss_type", "loss_weights"), MIXES)
@settings(max_examples=4)
# an empty batch never launches, and gives gradients of shape (0,)
@example(P=0, beta=0.1, seed=0)
@given(P=pair_counts, beta=st.sampled_from([0.01, 0.1, 2.0]), seed=st.integers(0, 99))
def test_forward_and_gradients(backend, dtype, loss_type, loss_weights, P, beta, seed):
    """Every type and a mix of all, with and without a reference, under a random upstream."""
    tensors, lengths = make_pairs(P, dtype=dtype, seed=seed)
    upstream = torch.randn(P, generator=torch.Generator().manual_seed(seed))
    mix = {"loss_type": loss_type, "loss_weights": loss_weights, "beta": beta}
    compare(backend, tensors, lengths, upstream, **mix)
    without_reference = {n: t for n, t in tensors.items() if not n.startswith("ref")}
    compare(backend, without_reference, lengths, upstream, **mix)


def test_reference_and_table():
    """The oracle has the values computed by hand, and every row of the table is served."""
    c, r = torch.tensor([-2.0], dtype=torch.float64), torch.tensor([-7.0], dtype=torch.float64)
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([0])}
    by_hand = {
        # beta (c - r) = 0.5
        "sigmoid": math.log1p(math.exp(-0.5)),
        "hinge": 0.5,
        # -2 / 4 + 7 / 1 - 1 / 0.2
        "ipo": 1.5**2,
    }
    assert set(by_hand) == set(LOSS_TYPE_NAMES)
    for name, value in by_hand.items():
        for call in (preference_loss_reference, preference_loss):
            out = call(c, r, loss_type=name, beta=0.1, **lengths)
            losses = (out if isinstance(out, dict) else out._asdict())["losses"]
            assert losses.item() == pytest.approx(value, rel=1e-12)

    assert len({row.id for row in LOSS_TYPES}) == len(LOSS_TYPES)
    for row in LOSS_TYPES:
        assert f"{row.name}: {row.formula}" in " ".join(preference_loss.__doc__.split())

    tensors, lengths = make_pairs(5, dtype=torch.float64)
    leaves = [t.requires_grad_(not n.startswith("ref")) for n, t in tensors.items()]
    for call in (preference_loss_reference, preference_loss):
        for loss_type, loss_weights in MIXES:

            def losses(*args, call=call, mix=(loss_type, loss_weights)):
                out = call(*args, loss_type=mix[0], loss_weights=mix[1], **lengths)
                return out["losses"] if isinstance(out, dict) else out.losses

            assert torch.autograd.gradcheck(losses, leaves)


def test_needs_input_grad(backend):
    """Row 21: a frozen side gets no gradient and the values keep their bits."""
    name, device = backend
    tensors, lengths = make_pairs(9)
    values = []
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        leaves = [t.to(device).clone() for t in tensors.values()]
        for leaf, need in zip(leaves, needs, strict=False):
            leaf.requires_grad_(need)
        out = preference_loss(*leaves, backend=name)
        assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad
        assert out.losses.requires_grad == any(needs)
        if any(needs):
            out.losses.sum().backward()
        assert tuple(leaf.grad is not None for leaf in leaves) == (*needs, False, False)
        values.append(out.losses.detach())
    assert all(torch.equal(values[0], value) for value in values[1:])


def test_edges(backend, poisoned_empty):
    """Rows 2, 3, 4, 10, 11, 32: empty, all masked, no tokens, NaN, fp16 extremes, exact zero."""
    name, device = backend

    def losses(chosen, rejected, *refs, dtype=torch.float32, lengths=(3, 3), **kwargs):
        to = [torch.tensor(t, dtype=dtype, device=device) for t in (chosen, rejected, *refs)]
        leaves = [t.requires_grad_(i < 2) for i, t in enumerate(to)]
        counts = [torch.full((len(chosen),), n, device=device) for n in lengths]
        out = preference_loss(
            *leaves, chosen_lengths=counts[0], rejected_lengths=counts[1], backend=name, **kwargs
        )
        out.losses.sum().backward()
        return out, leaves[0].grad, leaves[1].grad

    for loss_type, loss_weights in MIXES:
        mix = {"loss_type": loss_type, "loss_weights": loss_weights}
        # every label ignored: the log-probs are 0, so is the length, and the loss stays connected
        out, *grads = losses([0.0], [0.0], [0.0], [0.0], lengths=(0, 0), **mix)
        assert all(t.isfinite().all() for t in (out.losses, *grads))
        out, *grads = losses([-5.0, math.nan, -6.0], [-9.0, -1.0, -2.0], **mix)
        assert out.losses.isnan().tolist() == [False, True, False]
        assert all(grad[[0, 2]].isfinite().all() for grad in grads)
        # the difference of two fp16 log-probs leaves fp16's range
        out, *grads = losses(
            [-65504.0], [65504.0], dtype=torch.float16, lengths=(99, 99), beta=0.01, **mix
        )
        assert all(t.isfinite().all() for t in (out.losses, *grads))
        for margin in (-1e4, 1e4):
            out, *grads = losses([margin], [0.0], **mix)
            assert all(t.isfinite().all() for t in (out.losses, *grads))
        out, *grads = losses([], [], [], [], **mix)
        assert out.losses.shape == grads[0].shape == (0,)

    # policy equal to reference
    same = torch.randn(50, generator=torch.Generator().manual_seed(1)).mul(300).tolist()
    out, grad, _ = losses(same, same[::-1], same, same[::-1])
    assert torch.equal(out.chosen_rewards - out.rejected_rewards, torch.zeros_like(out.losses))
    assert out.losses.unique().numel() == 1
    assert out.losses[0].item() == pytest.approx(math.log(2.0), abs=1e-7)
    # the kink of the hinge is margin 1
    out, grad, _ = losses([10.0, 9.9], [0.0, 0.0], loss_type="hinge", beta=0.1)
    assert out.losses[0].item() == 0.0 and grad[0].item() == 0.0 and grad[1].item() < 0.0


def test_noncontiguous(backend):
    """Rows 12, 13, 15: views give the bits of their copies; any upstream, also stride 0."""
    name, device = backend
    base = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)).to(device) * 9
    views = [base[0, ::2], base[1:3].T[:20, 0], base[2, 5].expand(20), base[3].narrow(0, 7, 20)]

    def grads_of(tensors, upstream):
        leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(tensors)]
        loss = preference_loss(*leaves, loss_type=["sigmoid", "hinge"], backend=name).losses
        return loss, torch.stack(torch.autograd.grad(loss, leaves[:2], upstream))

    upstream = torch.randn(20, generator=torch.Generator().manual_seed(4)).to(device)
    loss, grads = grads_of(views, upstream)
    copy_loss, copy_grads = grads_of([t.contiguous() for t in views], upstream)
    assert torch.equal(loss, copy_loss) and torch.equal(grads, copy_grads)
    strided = upstream.new_zeros(40)[::2].copy_(upstream)
    assert torch.equal(grads_of(views, strided)[1], grads)
    assert torch.equal(grads_of(views, upstream * 4)[1], grads * 4)
    assert not grads_of(views, upstream * 0)[1].any()
    # y.mean().backward() sends an expanded scalar
    mean = grads_of(views, torch.tensor(1 / 20, device=device).expand(20))[1]
    assert torch.equal(mean, grads_of(views, torch.full((20,), 1 / 20, device=device))[1])


def test_autograd_contract(backend, poisoned_empty):
    """Rows 19, 20, 22, 33: two backwards, no double backward, checkpointing, same bits each run."""
    name, device = backend
    tensors, lengths = make_pairs(BLOCK_P + 5)
    lengths = {n: t.to(device) for n, t in lengths.items()}
    mix = {"loss_type": list(LOSS_TYPE_NAMES), "backend": name, **lengths}
    leaves = [t.to(device).requires_grad_(not n.startswith("ref")) for n, t in tensors.items()]

    def losses(*args):
        return preference_loss(*args, **mix).losses

    first = losses(*leaves)
    upstream = torch.ones_like(first)
    grads = torch.autograd.grad(first, leaves[:2], upstream, retain_graph=True)
    kept = [grad.clone() for grad in grads]
    twice = torch.autograd.grad(first, leaves[:2], upstream * 2, retain_graph=True)
    for grad, before, double in zip(grads, kept, twice, strict=True):
        assert torch.equal(grad, before) and torch.equal(double, 2 * before)
    for _ in range(2):
        again = losses(*leaves)
        assert torch.equal(again, first)
        again_grads = torch.autograd.grad(again, leaves[:2], upstream)
        assert all(torch.equal(a, b) for a, b in zip(again_grads, kept, strict=True))
    for use_reentrant in (False, True):
        out = checkpoint(losses, *leaves, use_reentrant=use_reentrant)
        for leaf in leaves[:2]:
            leaf.grad = None
        out.sum().backward()
        assert all(torch.equal(a.grad, b) for a, b in zip(leaves, kept, strict=False))

    with pytest.raises(RuntimeError, match="once_differentiable: double backward"):
        torch.autograd.grad(losses(*leaves).square().sum(), leaves[0], create_graph=True)


def test_compile():
    """Row 24: the torch backend is one graph."""
    tensors, lengths = make_pairs(7)
    leaves = [t.requires_grad_(not n.startswith("ref")) for n, t in tensors.items()]

    def losses(*args):
        return preference_loss(*args, loss_type=list(LOSS_TYPE_NAMES), **lengths).losses

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    eager_grads = torch.autograd.grad(losses(*leaves).sum(), leaves[:2])
    grads = torch.autograd.grad(compiled(*leaves).sum(), leaves[:2])
    assert all(torch.allclose(a, b) for a, b in zip(grads, eager_grads, strict=True))


def test_errors(backend):
    """Rows 5, 14, 26: one clear sentence for each mistake, before anything is allocated."""
    name, device = backend
    two, three = torch.zeros(2, device=device), torch.zeros(3, device=device)
    count = torch.ones(2, dtype=torch.int64, device=device)

    def refuse(error, text, *args, **kwargs):
        with pytest.raises(error) as raised:
            preference_loss(*args, backend=name, **kwargs)
        assert str(raised.value) == f"preference_loss: {text}"

    refuse(
        ValueError,
        "rejected_logps must have shape [P] with P=2 like chosen_logps, got (1,). "
        "A chosen/rejected batch must be even, got B=3.",
        *three.chunk(2),
    )
    refuse(
        ValueError,
        "ref_chosen_logps must have shape [P] with P=2 like chosen_logps, got (3,)",
        two,
        two,
        three,
        three,
    )
    refuse(ValueError, "chosen_logps must have shape [P], got (1, 2)", two[None], two[None])
    refuse(
        ValueError,
        "ref_rejected_logps must be given where ref_chosen_logps is, got None",
        *[two] * 3,
    )
    refuse(
        ValueError,
        "loss_type must be one of 'hinge', 'ipo', 'sigmoid', got 'dpo'",
        two,
        two,
        loss_type="dpo",
    )
    refuse(
        TypeError,
        "loss_type must be a name or a non-empty sequence of names, got []",
        two,
        two,
        loss_type=[],
    )
    refuse(
        ValueError,
        "chosen_lengths must be given for loss_type='ipo', got None",
        two,
        two,
        loss_type=["hinge", "ipo"],
        rejected_lengths=count,
    )
    refuse(
        ValueError,
        "loss_weights must have one weight for each of 1 types, got [1.0, 2.0]",
        two,
        two,
        loss_weights=[1.0, 2.0],
    )
    refuse(ValueError, "loss_weights must be finite, got nan", two, two, loss_weights=[math.nan])
    refuse(ValueError, "beta must be a finite float > 0, got 0", two, two, beta=0)
    refuse(ValueError, "beta must be a finite float > 0, got inf", two, two, beta=math.inf)
    refuse(TypeError, "beta must be a Python float, got Tensor", two, two, beta=two[0])
    refuse(TypeError, "rejected_logps must be a tensor, got list", two, [0.0, 0.0])
    refuse(
        TypeError,
        "rejected_logps must have dtype float32 like chosen_logps, got float16",
        two,
        two.half(),
    )
    refuse(
        TypeError,
        "chosen_logps must have dtype bfloat16, float16, float32, float64, got int64",
        count,
        count,
    )
    refuse(
        TypeError,
        "chosen_lengths must have dtype int32, int64, got float32",
        two,
        two,
        chosen_lengths=two,
        rejected_lengths=two,
    )
    refuse(
        ValueError,
        f"rejected_logps must be on {two.device} like chosen_logps, got meta",
        two,
        two.to("meta"),
    )
    if name == "triton":
        refuse(
            TypeError,
            "chosen_logps must have dtype bfloat16, float16, float32 on backend='triton', "
            "got float64. Use backend='torch'.",
            two.double(),
            two.double(),
        )


@pytest.mark.parametrize(("loss_type", "loss_weights"), MIXES)
def test_agrees_with_trl(backend, loss_type, loss_weights):
    """The batch loss and its gradient are those of TRL's own DPOTrainer on the same log-probs."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    name, device = backend
    P, T = 6, 9
    names, weights = (loss_type, loss_weights) if loss_weights else ([loss_type], [1.0])
    generator = torch.Generator().manual_seed(5)
    mask = torch.zeros(2 * P, T, dtype=torch.int64)
    for row, length in enumerate(torch.randint(1, T - 1, (2 * P,), generator=generator).tolist()):
        mask[row, T - length :] = 1
    # TRL's mask covers the ids, whose log-probs start one position later
    logps = -torch.rand(2 * P, T - 1, generator=generator) * 3 * mask[:, 1:]
    refs = -torch.rand(2, P, generator=generator) * 3 * mask.sum(1).view(2, P)

    leaf = logps.clone().requires_grad_()
    zeros = torch.zeros_like(logps)
    model_output = SimpleNamespace(
        log_probs=leaf, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=names,
        loss_weights=weights,
        beta=0.1,
        use_weighting=False,
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
    chosen, rejected = ours.sum(1).chunk(2)
    lengths = mask.sum(1).to(device)
    out = preference_loss(
        chosen,
        rejected,
        *refs.to(device),
        loss_type=loss_type,
        loss_weights=loss_weights,
        beta=0.1,
        chosen_lengths=lengths[:P],
        rejected_lengths=lengths[P:],
        backend=name,
    )
    out.losses.mean().backward()
    torch.testing.assert_close(out.losses.mean().cpu(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.cpu(), leaf.grad, rtol=1e-5, atol=1e-7)
    accuracy = (out.chosen_rewards > out.rejected_rewards).float().mean().item()
    assert trainer._metrics["train"]["rewards/accuracies"] == [pytest.approx(accuracy)]


def test_public_name():
    """The op and its output type are the package's."""
    assert spo_kernels.preference_loss is preference_loss
    assert spo_kernels.PreferenceLossOutput._fields == (
        "losses",
        "chosen_rewards",
        "rejected_rewards",
    )
