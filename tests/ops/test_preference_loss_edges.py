"""``preference_loss`` of every type at its edges, and a sentence for each mistake."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from spo_kernels import preference_loss
from spo_kernels.calls.loss_table import (
    LOSS_TYPE_NAMES,
    LOSS_TYPES,
    MAX_BATCH_PAIRS,
    PARAMETERS,
    loss_type_of,
)
from spo_kernels.reference.preference_loss import preference_loss_reference
from tests.helpers.preference_cases import BLOCK_P, MIXES, OPTIONS, leaves_of, make_case, rows_of
from tests.helpers.range_cases import ends_of
from tests.helpers.refusals import REFUSAL, assert_no_fp64_on_triton, assert_refused, refusal

TYPES = [(name,) for name in LOSS_TYPE_NAMES]
ALL = MIXES[-2]
# by hand: read from the table they would agree with whatever it says
RANGES = {
    "beta": "(0, inf)",
    "label_smoothing": "[0, 0.5)",
    "discopop_tau": "(0, inf)",
    "simpo_gamma": "[0, inf)",
    "alphapo_alpha": "(-inf, inf)",
    "ada_rho": "(0, inf)",
    "ada_tau_min": "(0, inf)",
    "ada_tau_max": "(0, inf]",
    "clip_chosen": "(0, inf)",
    "clip_rejected": "(0, inf)",
    "rwr_temperature": "(0, inf)",
    "rwr_max_weight": "(0, inf]",
    "min_reward_margin": "[0, inf)",
}


def losses_of(backend, chosen, rejected, names, *, ref=None, lengths=3, dtype=None, **settings):
    """Return (output, gradient of chosen, of rejected) of a sum of losses over lists of numbers."""
    name, device = backend

    def tensor(values):
        return torch.tensor(values, dtype=dtype or torch.float32, device=device)

    leaves = {"chosen_logps": tensor(chosen), "rejected_logps": tensor(rejected)}
    P = len(chosen)
    count = torch.full((P,), lengths, device=device)
    inputs = {"chosen_lengths": count, "rejected_lengths": count}
    if any("response" in row.inputs for row in rows_of(names)):
        leaves["response_logps"] = tensor(chosen)
        inputs["response_lengths"] = count
    inputs |= {f"reward_{side}": torch.ones(P, device=device) for side in ("chosen", "rejected")}
    if ref is not None:
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = map(tensor, ref)
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = preference_loss(
        **leaves, **inputs, loss_type=names, backend=name, **{**OPTIONS, **settings}
    )
    out.losses.sum().backward()
    return out, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)


def test_needs_input_grad(backend):
    """A frozen side gets no gradient and the values keep their bits."""
    name, device = backend
    tensors, inputs = make_case(ALL, 9)
    inputs = {n: t.to(device) for n, t in inputs.items()}
    values = []
    for needs in ((True,) * 3, (True, False, False), (False, True, True), (False,) * 3):
        leaves = {n: t.to(device).clone() for n, t in tensors.items()}
        policy = [leaves[f"{side}_logps"] for side in ("chosen", "rejected", "response")]
        for leaf, need in zip(policy, needs, strict=True):
            leaf.requires_grad_(need)
        out = preference_loss(**leaves, **inputs, loss_type=ALL, **OPTIONS, backend=name)
        assert not any(value.requires_grad for value in out[1:])
        assert out.losses.requires_grad == any(needs)
        if any(needs):
            out.losses.sum().backward()
        assert tuple(leaf.grad is not None for leaf in policy) == needs
        values.append(out.losses.detach())
    assert all(torch.equal(values[0], value) for value in values[1:])


@pytest.mark.parametrize("names", TYPES, ids="+".join)
def test_empty_and_ignored(backend, names, poisoned_empty):
    """No pairs, every label ignored, one completion without tokens."""
    out, *grads = losses_of(backend, [], [], names, ref=([], []))
    assert out.losses.shape == grads[0].shape == (0,)
    # every label ignored: the log-probs are 0, so is the length, and the loss stays connected
    out, *grads = losses_of(backend, [0.0], [0.0], names, ref=([0.0], [0.0]), lengths=0)
    assert grads and all(t.isfinite().all() for t in (out.losses, *grads))
    # the same from tokens: nothing counts, so no token has a gradient
    name, device = backend
    tokens = torch.full((2, 5), -1.0, device=device)
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[0] = False
    leaves = {f"{side}_logps": tokens.clone() for side in ("chosen", "rejected", "response")}
    inputs = {f"{side}_mask": mask for side in ("chosen", "rejected", "response")}
    if "response" not in loss_type_of(names[0]).inputs:
        del leaves["response_logps"], inputs["response_mask"]
    inputs |= {f"reward_{side}": torch.ones(2, device=device) for side in ("chosen", "rejected")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = preference_loss(**leaves, **inputs, loss_type=names, **OPTIONS, backend=name)
    out.losses.sum().backward()
    assert out.losses.isfinite().all()
    for leaf in leaves.values():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert grad.isfinite().all() and not grad[0].any()


# fp16 gradients round by half an eps, their smallest steps are 6e-8
ROUNDING = {torch.float32: (1e-5, 1e-8), torch.float16: (6e-4, 1e-6)}


@pytest.mark.parametrize("names", TYPES, ids="+".join)
def test_extremes(backend, names):
    """NaN stays in its pair (its rank), margins of 1e4 and fp16 beyond its range."""
    row = loss_type_of(names[0])
    out, *grads = losses_of(backend, [-5.0, math.nan, -6.0], [-9.0, -1.0, -2.0], names)
    if row.kind == "statistic":
        assert out.losses.isnan().all()
    elif row.kind == "ranked":
        # a NaN ranks last
        assert out.losses.isnan().tolist() == [False, False, True]
    else:
        assert out.losses.isnan().tolist() == [False, True, False]
        assert all(grad[[0, 2]].isfinite().all() for grad in grads)

    # finite wherever the value is: the same in fp64 says where that is
    cases = [([m], [0.0], torch.float32) for m in (-1e4, -3e2, 3e2, 1e4)]
    cases += [([0.0], [m], torch.float32) for m in (-1e4, 1e4)]
    cases += [([-1e4, -1e4], [-1e4, 0.0], torch.float32), ([-65504.0], [65504.0], torch.float16)]
    for chosen, rejected, dtype in cases:
        for beta in (0.1, 1.0):
            settings = {"dtype": dtype, "beta": beta, "lengths": 1}
            out, *grads = losses_of(backend, chosen, rejected, names, **settings)
            settings["dtype"] = torch.float64
            exact, *exact_grads = losses_of(("torch", "cpu"), chosen, rejected, names, **settings)
            for value, wanted in zip(
                (out.losses, *grads), (exact.losses, *exact_grads), strict=True
            ):
                largest = torch.finfo(value.dtype).max
                where = (wanted.abs() < largest) & wanted.isfinite()
                assert not value.isnan().any(), (chosen, rejected, beta)
                assert value.cpu()[where].isfinite().all(), (chosen, rejected, beta)
                rtol, atol = ROUNDING[dtype]
                close = torch.isclose(
                    value.cpu().double()[where], wanted[where], rtol=rtol, atol=atol
                )
                assert close.all(), (chosen, rejected, beta, value, wanted)


def test_policy_equal_to_reference(backend):
    """The margin is exactly 0 whatever the batch, from sums and from tokens."""
    name, device = backend
    generator = torch.Generator().manual_seed(1)
    same = torch.randn(50, generator=generator).mul(300).to(device)
    out = preference_loss(same, same.flip(0), same, same.flip(0), backend=name)
    assert torch.equal(out.chosen_rewards - out.rejected_rewards, torch.zeros_like(out.losses))
    assert out.losses.unique().numel() == 1
    assert out.losses[0].item() == pytest.approx(math.log(2.0), abs=1e-7)
    tokens = torch.randn(6, 700, generator=generator).to(device)
    first = preference_loss(tokens, tokens.flip(0), tokens, tokens.flip(0), backend=name)
    assert not first.chosen_rewards.any() and not first.rejected_rewards.any()
    # a pair keeps its bits beside any others
    alone = preference_loss(tokens[:1], tokens[5:], tokens[1:2], tokens[4:5], backend=name)
    flipped = tokens.flip(0)
    whole = preference_loss(tokens, flipped, tokens.roll(-1, 0), flipped.roll(-1, 0), backend=name)
    assert torch.equal(whole.losses[:1], alone.losses)


def test_kinks(backend):
    """No gradient at a kink itself, and the dual clip leaves a satisfied side alone."""
    out, grad, _ = losses_of(backend, [10.0, 9.9], [0.0, 0.0], ("hinge",))
    assert out.losses[0].item() == 0.0 and grad[0].item() == 0.0 and grad[1].item() < 0.0
    settings = {"clip_chosen": 0.5, "clip_rejected": 0.5}
    _, grad_c, grad_r = losses_of(
        backend, [6.0, 4.0, -99.0], [0.0, -6.0, 99.0], ("dual_clip",), **settings
    )
    assert (grad_c != 0).tolist() == [False, True, True]
    assert (grad_r != 0).tolist() == [True, False, True]


def test_pairs_that_count_nothing(backend):
    """A weight of 0 and a reward margin below the least leave a pair out, even an infinite one."""
    name, device = backend
    chosen = torch.tensor([-1e4, -5.0, -6.0], device=device, requires_grad=True)
    rejected = torch.zeros(3, device=device)
    weights = torch.tensor([0.0, 2.0, 1.0], device=device)
    rewards = torch.tensor([3.0, 3.0, 1.0], device=device), torch.ones(3, device=device)
    out = preference_loss(
        chosen,
        rejected,
        loss_type="cell",
        pair_weights=weights,
        reward_chosen=rewards[0],
        reward_rejected=rewards[1],
        min_reward_margin=0.5,
        beta=1.0,
        backend=name,
    )
    out.losses.sum().backward()
    assert (out.losses > 0).tolist() == (chosen.grad < 0).tolist() == [False, True, False]
    alone = preference_loss(chosen[1:2], rejected[:1], loss_type="cell", beta=1.0, backend=name)
    assert out.losses[1].item() == 2 * alone.losses.item()


def test_tokens_outside_every_response(backend, poisoned_empty):
    """Tokens before, between and after the responses get a gradient of exactly 0."""
    name, device = backend
    logps = torch.full((2, 10), -1.0, device=device, requires_grad=True)
    offsets = torch.tensor([3, 7, 7, 16], device=device)
    rejected = torch.zeros(3, device=device)
    out = preference_loss(logps, rejected, chosen_offsets=offsets, backend=name)
    assert out.chosen_logps.tolist() == [-4.0, 0.0, -9.0]
    out.losses.sum().backward()
    grad = logps.grad.flatten()
    assert not grad[:3].any() and not grad[16:].any() and (grad[3:16] < 0).all()
    mask = torch.zeros(2, 10, dtype=torch.int64, device=device)
    mask[0, 4:6] = 1
    out = preference_loss(logps, rejected, chosen_offsets=offsets, chosen_mask=mask, backend=name)
    (grad,) = torch.autograd.grad(out.losses.sum(), logps)
    assert grad.nonzero().tolist() == [[0, 4], [0, 5]]
    none = torch.zeros(1, dtype=torch.int64, device=device)
    out = preference_loss(logps, rejected[:0], chosen_offsets=none, backend=name)
    (grad,) = torch.autograd.grad(out.losses.sum(), logps)
    assert not grad.any()


def test_noncontiguous(backend):
    """Views give the bits of their copies; linear in any upstream, also one of stride 0."""
    name, device = backend
    names = ["sigmoid", "hinge", "aot", "aql"]
    base = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)).to(device) * 9
    views = [base[0, ::2], base[1:3].T[:20, 0], base[2, 5].expand(20), base[3].narrow(0, 7, 20)]

    def grads_of(tensors, upstream, names=names):
        leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(tensors)]
        loss = preference_loss(*leaves, loss_type=names, backend=name).losses
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
    tokens = torch.randn(20, 30, generator=torch.Generator().manual_seed(5)).to(device)
    wide = [tokens[:, ::2], tokens.T[:20, :15], tokens[:, :15], tokens[:, 3].expand(15, 20).T]
    loss, grads = grads_of(wide, upstream, "sigmoid")
    copy_loss, copy_grads = grads_of([t.contiguous() for t in wide], upstream, "sigmoid")
    assert torch.equal(loss, copy_loss) and torch.equal(grads, copy_grads)


# a form makes the sums that the types share, so one form has every type; sorting is slow
@pytest.mark.parametrize(
    ("form", "names", "P"),
    [
        ("sums", ALL[::4], BLOCK_P + 5),
        ("sums", ("aot", "aot_unpaired"), 5),
        ("rows", ALL, 3),
        ("offsets", ALL[::4], 3),
    ],
    ids=["sums", "sorts", "rows", "offsets"],
)
def test_autograd_contract(backend, form, names, P, poisoned_empty):
    """Two backwards agree, a double one is refused, checkpoints and runs give the same bits."""
    name, device = backend
    tensors, inputs = make_case(names, P, form=form)
    inputs = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    leaves = leaves_of(tensors, device)
    mine = [n for n, leaf in leaves.items() if leaf.requires_grad]
    policy = [leaves[n] for n in mine]

    def losses(*args):
        given = {**leaves, **dict(zip(mine, args, strict=True))}
        return preference_loss(**given, **inputs, loss_type=names, **OPTIONS, backend=name).losses

    first = losses(*policy)
    upstream = torch.ones_like(first)
    grads = torch.autograd.grad(first, policy, upstream, retain_graph=True)
    kept = [grad.clone() for grad in grads]
    twice = torch.autograd.grad(first, policy, upstream * 2, retain_graph=True)
    for grad, before, double in zip(grads, kept, twice, strict=True):
        assert torch.equal(grad, before) and torch.equal(double, 2 * before)
    again = losses(*policy)
    assert torch.equal(again, first)
    again_grads = torch.autograd.grad(again, policy, upstream)
    assert all(torch.equal(a, b) for a, b in zip(again_grads, kept, strict=True))
    for use_reentrant in (False, True):
        out = checkpoint(losses, *policy, use_reentrant=use_reentrant)
        for leaf in policy:
            leaf.grad = None
        out.sum().backward()
        assert all(torch.equal(a.grad, b) for a, b in zip(policy, kept, strict=True))

    with pytest.raises(RuntimeError, match="once_differentiable: double backward"):
        torch.autograd.grad(losses(*policy).square().sum(), policy[0], create_graph=True)


@pytest.mark.parametrize("form", ["sums", "rows", "offsets"])
def test_compile(form):
    """The torch backend is one graph under torch.compile, with eager's gradients."""
    names = ALL if form == "sums" else ALL[::4]
    tensors, inputs = make_case(names, 7, form=form, extras=True)
    leaves = leaves_of(tensors)
    policy = {n: leaf for n, leaf in leaves.items() if leaf.requires_grad}

    def losses(policy):
        given = {**leaves, **policy}
        return preference_loss(**given, **inputs, loss_type=names, **OPTIONS).losses

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    eager_grads = torch.autograd.grad(losses(policy).sum(), policy.values())
    grads = torch.autograd.grad(compiled(policy).sum(), policy.values())
    assert all(torch.allclose(a, b) for a, b in zip(grads, eager_grads, strict=True))


def test_many_pairs_of_a_batch_type(backend):
    """More pairs than one program holds: auto takes torch, an explicit triton raises."""
    name, device = backend
    P = MAX_BATCH_PAIRS + 1
    tensors, inputs = make_case(("aot_unpaired",), P)
    out = preference_loss(**{n: t.to(device) for n, t in tensors.items()}, loss_type="aot_unpaired")
    wanted = preference_loss_reference(**tensors, loss_type="aot_unpaired")["losses"]
    torch.testing.assert_close(out.losses.cpu(), wanted)
    if name == "triton":
        with pytest.raises(NotImplementedError) as raised:
            preference_loss(
                **{n: t.to(device) for n, t in tensors.items()},
                loss_type="aot_unpaired",
                backend=name,
            )
        assert str(raised.value) == (
            f"preference_loss: backend='triton' takes up to {MAX_BATCH_PAIRS} pairs for "
            f"loss_type='aot_unpaired', got {P}. Use backend='torch' or backend='auto'."
        )


# arguments of the refusals below, moved to a test's device
TWO, THREE, TOKENS = torch.zeros(2), torch.zeros(3), torch.zeros(2, 3)
COUNT = torch.ones(2, dtype=torch.int64)
NAMES = ", ".join(repr(name) for name in sorted(LOSS_TYPE_NAMES))

SHAPES_AND_DTYPES = [
    refusal(
        ValueError,
        "rejected_logps must have shape [P] with P=2 like chosen_logps, got (1,). "
        "A chosen/rejected batch must be even, got B=3.",
        *THREE.chunk(2),
    ),
    refusal(
        ValueError,
        "ref_chosen_logps must have shape [P] with P=2 like chosen_logps, got (3,)",
        TWO,
        TWO,
        THREE,
        THREE,
    ),
    refusal(
        ValueError,
        "chosen_logps must have shape [P] (sums) or [P, T] (token log-probs), got (1, 1, 2)",
        TWO[None, None],
        TWO,
    ),
    refusal(
        ValueError,
        "ref_rejected_logps must be given where ref_chosen_logps is, got None",
        *[TWO] * 3,
    ),
    refusal(
        ValueError,
        "ref_chosen_logps must have shape (2, 3) like chosen_logps, got (2, 2)",
        TOKENS,
        TOKENS,
        TOKENS[:, :2],
        TOKENS,
    ),
    refusal(
        ValueError,
        "pair_weights must have shape [P] with P=2 like chosen_logps, got (3,)",
        TWO,
        TWO,
        pair_weights=THREE,
    ),
    refusal(
        ValueError,
        "chosen_mask must have shape (2, 3) like chosen_logps, got (2, 2)",
        TOKENS,
        TOKENS,
        chosen_mask=TOKENS[:, :2].bool(),
    ),
    refusal(
        ValueError,
        "chosen_logps must have two axes, [1, T] for packed tokens, with chosen_offsets, got (2,)",
        TWO,
        TWO,
        chosen_offsets=torch.tensor([0, 1, 2]),
    ),
    refusal(
        TypeError,
        "chosen_offsets must have dtype int64, got int32",
        TOKENS,
        TWO,
        chosen_offsets=torch.tensor([0, 3, 6], dtype=torch.int32),
    ),
    refusal(TypeError, "rejected_logps must be a tensor, got list", TWO, [0.0, 0.0]),
    refusal(
        TypeError,
        "rejected_logps must have dtype float32 like chosen_logps, got float16",
        TWO,
        TWO.half(),
    ),
    refusal(
        TypeError,
        "chosen_logps must have dtype bfloat16, float16, float32, float64, got int64",
        COUNT,
        COUNT,
    ),
    refusal(
        TypeError,
        "chosen_lengths must have dtype int32, int64, got float32",
        TWO,
        TWO,
        chosen_lengths=TWO,
        rejected_lengths=TWO,
    ),
    refusal(
        ValueError,
        "rejected_logps must be on {device} like chosen_logps, got meta",
        TWO,
        TWO.to("meta"),
    ),
]
MIXES_AND_SETTINGS = [
    refusal(ValueError, f"loss_type must be one of {NAMES}, got 'dpo'", TWO, TWO, loss_type="dpo"),
    refusal(
        TypeError,
        "loss_type must be a name or a non-empty sequence of names, got []",
        TWO,
        TWO,
        loss_type=[],
    ),
    refusal(
        ValueError,
        "loss_weights must have one weight for each of 1 types, got [1.0, 2.0]",
        TWO,
        TWO,
        loss_weights=[1.0, 2.0],
    ),
    *(
        refusal(ValueError, f"{name} must be finite, got {value}", TWO, TWO, **{name: given(value)})
        for name, given in (("f_alpha_divergence_coef", float), ("loss_weights", lambda v: [v]))
        for value in (math.nan, math.inf, -math.inf)
    ),
    refusal(TypeError, "beta must be a Python float, got Tensor", TWO, TWO, beta=TWO[0]),
    *(
        refusal(TypeError, f"{name} must be a Python float, got bool", TWO, TWO, **{name: True})
        for name in RANGES
    ),
    refusal(
        ValueError,
        "label_smoothing must be > 0 for loss_type='exo_pair', got 0.0",
        TWO,
        TWO,
        loss_type="exo_pair",
    ),
    refusal(
        ValueError,
        "ada_tau_max must be at least ada_tau_min=2, got 1.0",
        TWO,
        TWO,
        ada_tau_min=2.0,
        ada_tau_max=1.0,
    ),
    *(
        refusal(
            ValueError,
            f"ld_alpha must be between 0 and 1, [0, 1], got {value}",
            TOKENS,
            TOKENS,
            ld_alpha=value,
        )
        for value in ends_of("[0, 1]")[0]
    ),
    refusal(
        ValueError,
        "chosen_logps must hold token log-probs [P, T] with ld_alpha, got (2,)",
        TWO,
        TWO,
        ld_alpha=0.5,
    ),
    refusal(
        ValueError,
        "f_divergence_type must be 'reverse_kl' for loss_type='nca_pair', got 'forward_kl'. "
        "Types with other divergences: "
        f"{', '.join(repr(n) for n in sorted(row.name for row in LOSS_TYPES if row.divergence))}.",
        TWO,
        TWO,
        loss_type="nca_pair",
        f_divergence_type="forward_kl",
    ),
    refusal(
        ValueError,
        "reward_chosen must be given with min_reward_margin, got None",
        TWO,
        TWO,
        min_reward_margin=0.1,
    ),
]


def refusals_of_a_type(row):
    """What one loss type needs, or cannot have, each left out or given in turn."""
    settings = {"loss_type": row.name, "label_smoothing": 0.1}
    if "lengths" in row.inputs:
        text = f"chosen_lengths must be given for loss_type={row.name!r}, got None"
        yield refusal(ValueError, text, TWO, TWO, **settings)
        settings |= {"chosen_lengths": COUNT, "rejected_lengths": COUNT}
    for what, name in (("response", "response_logps"), ("rewards", "reward_chosen")):
        if what in row.inputs:
            text = f"{name} must be given for loss_type={row.name!r}, got None"
            yield refusal(ValueError, text, TWO, TWO, **settings)
    if row.kind == "ranked":
        text = (
            f"pair_weights must be left out for loss_type={row.name!r}, which pairs by rank, "
            "got a weight of each pair"
        )
        yield refusal(ValueError, text, TWO, TWO, pair_weights=TWO, **settings)


INPUTS_OF_TYPES = [
    *(case for row in LOSS_TYPES for case in refusals_of_a_type(row)),
    refusal(
        ValueError,
        "chosen_lengths must be given for loss_type='ipo', got None",
        TWO,
        TWO,
        loss_type=["hinge", "ipo"],
        rejected_lengths=COUNT,
    ),
    refusal(
        ValueError,
        "chosen_lengths must be given for loss_type='ipo', got None. Or give chosen_mask, whose "
        "tokens are counted.",
        TOKENS,
        TOKENS,
        loss_type="ipo",
    ),
    refusal(
        ValueError,
        "response_logps must be None where no type of the mix reads it, got (2,)",
        TWO,
        TWO,
        response_logps=TWO,
    ),
    refusal(
        ValueError,
        "response_lengths must be None without response_logps, got Tensor",
        TWO,
        TWO,
        response_lengths=COUNT,
    ),
    refusal(
        ValueError,
        "rejected_log_sum_sq_probs must be given where chosen_log_sum_sq_probs is, got None",
        TWO,
        TWO,
        chosen_log_sum_sq_probs=TWO,
    ),
    refusal(
        ValueError,
        "chosen_mask must be None where chosen_logps are sums, got (2,). Give chosen_lengths.",
        TWO,
        TWO,
        chosen_mask=TWO.bool(),
    ),
    refusal(
        ValueError,
        "chosen_lengths must be None where chosen_mask counts the tokens, got (2,)",
        TOKENS,
        TOKENS,
        chosen_mask=TOKENS.bool(),
        chosen_lengths=COUNT,
    ),
]


@pytest.mark.parametrize(REFUSAL, SHAPES_AND_DTYPES + MIXES_AND_SETTINGS + INPUTS_OF_TYPES)
def test_errors(backend, error, text, args, settings):
    """Odd batches, shapes, dtypes, devices, settings: one sentence for each mistake."""
    assert_refused(preference_loss, backend, error, text, args, settings)


def test_no_fp64_on_triton(backend):
    tensors = {"chosen_logps": TWO, "rejected_logps": TWO}
    assert_no_fp64_on_triton(preference_loss, backend, tensors, *tensors)


def test_every_parameter_has_a_range():
    assert list(RANGES) == [parameter.name for parameter in PARAMETERS]


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda row: row.name)
def test_ranges(backend, parameter):
    """A value just outside is refused, the ends that belong to the range are taken."""
    name, device = backend
    two = TWO.to(device)
    refused, taken = ends_of(RANGES[parameter.name])
    for value in refused:
        with pytest.raises(ValueError) as raised:
            preference_loss(two, two, **{parameter.name: value}, backend=name)
        text = f"{parameter.name} must {parameter.requirement}, got {value}"
        assert str(raised.value) == f"preference_loss: {text}"
    for value in taken:
        out = preference_loss(two, two, **{parameter.name: value}, backend=name)
        assert out.losses.isfinite().all()


@pytest.mark.parametrize("ld_alpha", ends_of("[0, 1]")[1])
def test_ends_of_ld_alpha(backend, ld_alpha):
    name, device = backend
    tokens = TOKENS.to(device)
    out = preference_loss(tokens, tokens, ld_alpha=ld_alpha, backend=name)
    assert out.losses.isfinite().all()
