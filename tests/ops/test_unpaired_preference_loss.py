"""``unpaired_preference_loss``: both backends against the fp64 oracle, TRL, Liger, edges."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from spo_kernels import unpaired_preference_loss
from spo_kernels.calls.loss_table import UNPAIRED_LOSS_TYPES, UNPAIRED_PARAMETERS
from spo_kernels.reference.unpaired_preference_loss import unpaired_preference_loss_reference
from tests.helpers.oracle import assert_within_budget
from tests.helpers.range_cases import ends_of
from tests.helpers.refusals import REFUSAL, assert_no_fp64_on_triton, assert_refused, refusal

# sums a program owns, and tokens it reads at a time
BLOCK_S, BLOCK_T = 128, 1024
NAMES = tuple(row.name for row in UNPAIRED_LOSS_TYPES)
RANGES = {"beta": "(0, inf)", "desirable_weight": "[0, inf)", "undesirable_weight": "[0, inf)"}
# every type with every source of its baseline
CASES = [
    ("kto", ("kl_logps", "ref_kl_logps")),
    ("kto", ("kl",)),
    ("apo_zero_unpaired", ()),
    ("bco", ()),
    ("bco", ("reward_shift",)),
]
FORMS = ("sums", "rows", "flat", "rows and sums", "flat and sums", "no reference")


def make_responses(S, form="sums", *, T=9, dtype=torch.float32, seed=0):
    """Random log-probs in one of the forms, labels, offsets or None, and what feeds a baseline."""
    generator = torch.Generator().manual_seed(seed)
    tokens = -3.0 * torch.rand(2, S, T, generator=generator)
    offsets = None
    if form == "sums":
        logps, ref_logps = tokens.sum(2)
    elif form.startswith("rows") or form == "no reference":
        tokens = tokens * (torch.rand(S, T, generator=generator) < 0.8)
        logps, ref_logps = tokens
    else:
        # gaps at both ends, empty responses, and row ends that are no response's
        lengths = torch.randint(0, max(S * T // max(S, 1), 1), (S,), generator=generator)
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))) + 1
        tokens = -3.0 * torch.rand(2, S + 1, T, generator=generator)
        logps, ref_logps = tokens
    if form.endswith("and sums"):
        ref_logps = -3.0 * T * torch.rand(S, generator=generator)
    is_desirable = torch.rand(S, generator=generator) < 0.6
    baselines = {
        "kl_logps": -30.0 * torch.rand(2 * S + 1, generator=generator),
        "ref_kl_logps": -40.0 * torch.rand(2 * S + 1, generator=generator),
        "kl": torch.randn((), generator=generator) * 5,
        "reward_shift": torch.randn((), generator=generator),
    }
    ref_logps = None if form == "no reference" else ref_logps.to(dtype)
    return logps.to(dtype), ref_logps, is_desirable, offsets, baselines


def run(call, logps, ref_logps, is_desirable, upstream, **settings):
    """Return the outputs and the gradient under ``upstream``, by name."""
    leaf = logps.clone().requires_grad_()
    out = call(leaf, ref_logps, is_desirable, **settings)
    out = dict(out) if isinstance(out, dict) else out._asdict()
    out["losses"].backward(upstream.to(out["losses"].device, out["losses"].dtype))
    return {**out, "grad_logps": leaf.grad}


def moved(values, to):
    """Apply ``to`` to the tensors of a dict."""
    return {name: to(t) if isinstance(t, torch.Tensor) else t for name, t in values.items()}


def compare(backend, tensors, upstream, **settings):
    """Hold every output and the gradient of ``backend`` to the budget."""
    name, device = backend
    reference = unpaired_preference_loss_reference
    tensors = dict(zip(("logps", "ref_logps", "is_desirable"), tensors, strict=True))

    def as_dtype(dtype):
        return lambda t: t.to(dtype) if t.is_floating_point() else t

    def call(op, to, **more):
        return run(op, **moved(tensors, to), upstream=to(upstream), **moved(settings, to), **more)

    oracle = call(reference, as_dtype(torch.float64))
    eager = call(reference, as_dtype(torch.float32))
    eager["grad_logps"] = eager["grad_logps"].to(tensors["logps"].dtype)
    actual = call(unpaired_preference_loss, lambda t: t.to(device), backend=name)
    for field, value in actual.items():
        label = f"unpaired_preference_loss[{name}].{field}"
        assert_within_budget(label, value, eager[field], oracle[field])
    return actual


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("loss_type", "sources"), CASES)
@settings(max_examples=2)
# an empty batch still writes its baseline
@example(S=0, T=3, beta=0.1, seed=0, dtype=torch.float32)
@example(S=BLOCK_S + 1, T=2, beta=0.1, seed=1, dtype=torch.float32)
@given(
    S=st.integers(1, 6),
    T=st.sampled_from([1, 7, BLOCK_T - 1, BLOCK_T + 3]),
    beta=st.sampled_from([0.01, 0.1, 2.0]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_forward_and_gradients(backend, form, loss_type, sources, S, T, beta, seed, dtype):
    """Every type, source of its baseline and form of the log-probs, under a random upstream."""
    *tensors, offsets, baselines = make_responses(S, form, T=T, dtype=dtype, seed=seed)
    out = compare(
        backend,
        tensors,
        torch.randn(S, generator=torch.Generator().manual_seed(seed)),
        loss_type=loss_type,
        beta=beta,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        segment_offsets=offsets,
        **{name: baselines[name] for name in sources},
    )
    assert out["kl"].shape == out["reward_shift"].shape == ()
    assert out["grad_logps"].dtype == dtype


def test_reference_and_table(backend):
    """Values computed by hand, every row of the table served, and gradients by differences."""
    name, device = backend

    def s(t):
        return 1 / (1 + math.exp(-t))

    d = torch.tensor([-2.0, 3.0, 5.0])
    good = torch.tensor([True, False, True])
    # the mean of the differences is 4, so beta z is 0.4
    samples = {"kl_logps": torch.tensor([-1.0, -2.0]), "ref_kl_logps": torch.tensor([-8.0, -3.0])}
    shift = (0.15 + 0.3) / 2
    by_hand = {
        "kto": (samples, [2 * s(0.6), 0.5 * s(-0.1), 2 * s(-0.1)], 4.0, 0.0),
        "apo_zero_unpaired": ({}, [2 * s(0.2), 0.5 * s(0.3), 2 * s(-0.5)], 0.0, 0.0),
        "bco": (
            {},
            [
                2 * math.log1p(math.exp(0.2 + shift)),
                0.5 * math.log1p(math.exp(0.3 - shift)),
                2 * math.log1p(math.exp(shift - 0.5)),
            ],
            0.0,
            shift,
        ),
    }
    assert set(by_hand) == set(NAMES)
    weights = {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    for loss_type, (inputs, losses, kl, reward_shift) in by_hand.items():
        settings = {"loss_type": loss_type, **weights}
        wide = moved(inputs, lambda t: t.double())
        out = unpaired_preference_loss_reference(d.double(), None, good, **settings, **wide)
        assert out["losses"].tolist() == pytest.approx(losses, rel=1e-7)
        here = moved(inputs, lambda t: t.to(device))
        out = unpaired_preference_loss(
            d.to(device), None, good.to(device), backend=name, **settings, **here
        )
        assert out.losses.tolist() == pytest.approx(losses, rel=1e-6)
        assert out.rewards.tolist() == pytest.approx([-0.2, 0.3, 0.5])
        assert out.kl.item() == pytest.approx(kl)
        assert out.reward_shift.item() == pytest.approx(reward_shift)

    assert [row.name for row in UNPAIRED_PARAMETERS] == ["beta", *weights]
    text = " ".join(unpaired_preference_loss.__doc__.split())
    for row in UNPAIRED_LOSS_TYPES:
        assert f"{row.name}: {row.formula}" in text
    if name == "triton":
        return
    for loss_type, sources in CASES:
        for form in ("sums", "flat"):
            data = make_responses(4, form, T=4, dtype=torch.float64, seed=2)
            logps, ref_logps, is_desirable, offsets, baselines = data
            inputs = {name: baselines[name].double() for name in sources}
            if loss_type == "bco":
                # no gradient through the shift, so it must not move
                inputs = {"reward_shift": torch.tensor(0.3, dtype=torch.float64)}
            for call in (unpaired_preference_loss_reference, unpaired_preference_loss):

                def losses(leaf, call=call, loss_type=loss_type, data=data, inputs=inputs):
                    settings = {"loss_type": loss_type, "segment_offsets": data[3], **inputs}
                    out = call(leaf, data[1], data[2], **settings)
                    return out["losses"] if isinstance(out, dict) else out.losses

                assert torch.autograd.gradcheck(losses, logps.requires_grad_())


def test_baseline(backend):
    """A negative kl counts as 0, a NaN stays one, no sample is 0; a side may be empty."""
    name, device = backend
    d = torch.tensor([1.0, -2.0, 4.0], device=device)
    good = torch.tensor([True, False, True], device=device)

    def loss_of(labels, **settings):
        return unpaired_preference_loss(d, None, labels, backend=name, **settings)

    zero, below = torch.tensor(0.0, device=device), torch.tensor(-3.0, device=device)
    at_zero, at_below = loss_of(good, kl=zero), loss_of(good, kl=below)
    assert torch.equal(at_zero.losses, at_below.losses) and at_below.kl.item() == 0.0
    nothing = d[:0]
    assert loss_of(good, kl_logps=nothing, ref_kl_logps=nothing).kl.item() == 0.0
    assert loss_of(good, kl=zero * math.nan).losses.isnan().all()
    many = torch.linspace(-90.0, -80.0, 1000, device=device)
    out = loss_of(good, kl_logps=many, ref_kl_logps=many - 2.5)
    assert out.kl.item() == pytest.approx(2.5, rel=1e-6)
    # bco: both sides, and each alone
    assert loss_of(good, loss_type="bco").reward_shift.item() == pytest.approx(0.025)
    for labels in (good | True, good & False):
        shift = loss_of(labels, loss_type="bco").reward_shift
        assert shift.item() == pytest.approx(0.1, rel=1e-6)


def test_needs_input_grad(backend):
    """Gradients flow to logps alone, and the values keep their bits without them."""
    name, device = backend
    logps, ref_logps, is_desirable, _, baselines = make_responses(7)
    inputs = {n: baselines[n].to(device).requires_grad_() for n in ("kl_logps", "ref_kl_logps")}
    values = []
    for needs in (True, False):
        leaves = [t.clone().to(device) for t in (logps, ref_logps)]
        leaves[0].requires_grad_(needs)
        fixed = inputs if needs else moved(inputs, torch.Tensor.detach)
        out = unpaired_preference_loss(*leaves, is_desirable.to(device), backend=name, **fixed)
        assert out.losses.requires_grad == needs
        assert not any(t.requires_grad for t in out[1:])
        if needs:
            out.losses.sum().backward()
            assert leaves[0].grad is not None and inputs["kl_logps"].grad is None
        values.append(out.losses.detach())
    assert torch.equal(*values)


@pytest.mark.parametrize("loss_type", NAMES)
def test_edges(backend, poisoned_empty, loss_type):
    """Empty, no tokens, NaN in its row, fp16 extremes, exact zero."""
    name, device = backend
    settings = {"loss_type": loss_type, "backend": name}
    if loss_type == "kto":
        settings["kl"] = torch.tensor(0.5, device=device)
    if loss_type == "bco":
        settings["reward_shift"] = torch.tensor(0.5, device=device)

    def losses(logps, ref_logps=None, dtype=torch.float32, **more):
        leaf = torch.as_tensor(logps, dtype=dtype, device=device).clone().requires_grad_()
        S = more["segment_offsets"].numel() - 1 if "segment_offsets" in more else leaf.shape[0]
        good = torch.arange(S, device=device) % 2 == 0
        out = unpaired_preference_loss(leaf, ref_logps, good, **settings, **more)
        out.losses.sum().backward()
        return out, leaf.grad

    for bad in (math.nan, math.inf):
        out, grad = losses([[-5.0, -1.0], [-1.0, bad], [-2.0, 0.0]])
        assert out.logps.isfinite().tolist() == [True, False, True]
        assert out.losses[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()
    assert losses([-5.0, math.nan])[0].losses.isnan().tolist() == [False, True]
    out, grad = losses([-65504.0, 65504.0, 60000.0], dtype=torch.float16)
    assert out.losses.isfinite().all() and grad.isfinite().all()
    # the difference, and the sum over tokens, leave fp16's range
    extreme = torch.full((2, 5), -65504.0, dtype=torch.float16, device=device)
    out, grad = losses(extreme, -extreme, dtype=torch.float16)
    assert out.losses.isfinite().all() and out.logps.tolist() == [-65504.0 * 5] * 2
    out, grad = losses([1e4, 1e4, -1e4, -1e4])
    assert out.losses.isfinite().all() and grad.isfinite().all()

    # no token at all: the log-probs are 0, and the gradient has the shape of its input
    for shape in ((3, 0), (0, 4), (0,)):
        out, grad = losses(torch.zeros(shape))
        assert grad.shape == shape and not out.logps.any() and out.logps.shape == shape[:1]
    offsets = torch.tensor([0, 0, 2, 2], device=device)
    out, grad = losses([-1.0, -2.0, -4.0], segment_offsets=offsets)
    assert out.logps.tolist() == [0.0, -3.0, 0.0]
    assert grad[0] == grad[1] != 0 and grad[2] == 0
    beyond = torch.tensor([-3, 1, 99], device=device)
    out, grad = losses([-1.0, -2.0, -4.0], segment_offsets=beyond)
    assert out.logps.tolist() == [-1.0, -6.0] and grad.all()
    out, grad = losses(torch.zeros(0), segment_offsets=offsets * 0)
    assert out.losses.isfinite().all() and grad.shape == (0,)

    # policy equal to reference, token by token
    tokens = torch.randn(6, 1500, generator=torch.Generator().manual_seed(1)).mul(9).to(device)
    out, _ = losses(tokens, tokens)
    assert not out.rewards.any()
    flat = torch.tensor([0, 700, 2000, 2001, 8000], device=device)
    assert not losses(tokens, tokens, segment_offsets=flat)[0].rewards.any()
    # a response has one value whatever the batch around it
    if loss_type != "bco":
        alone, _ = losses(tokens[:1])
        assert torch.equal(alone.losses, losses(tokens)[0].losses[:1])


def test_noncontiguous(backend):
    """Views give the bits of their copies; linear in any upstream, also one of stride 0."""
    name, device = backend
    base = torch.randn(12, 40, generator=torch.Generator().manual_seed(3)).to(device) * 9
    good = (base[:, ::5] > 0)[:6, 0]
    kl = base[7, ::3]

    def grads_of(tensors, upstream, offsets=None):
        leaf = tensors[0].detach().requires_grad_()
        loss = unpaired_preference_loss(
            leaf,
            tensors[1],
            tensors[2],
            kl_logps=tensors[3],
            ref_kl_logps=tensors[4],
            segment_offsets=offsets,
            backend=name,
        ).losses
        return loss, torch.autograd.grad(loss, leaf, upstream)[0]

    upstream = torch.randn(6, generator=torch.Generator().manual_seed(4)).to(device)
    doubled = torch.tensor([0, 3, 9, 9, 20, 41, 60], device=device).repeat_interleave(2)
    for logps, ref_logps, offsets in (
        (base[::2, 0], base[3, 5].expand(6), None),
        (base[::2, 1:30], base[5:11, 2:31], None),
        (base.T[:6], base.T[6:12], None),
        (base[3].expand(6, 40), base[::2, 4], None),
        (base[::2, 1:30], base[::2, 2:31], doubled[::2]),
    ):
        views = [logps, ref_logps, good, kl, kl.flip(0)[::1]]
        loss, grad = grads_of(views, upstream, offsets)
        copies = [t.contiguous() for t in views]
        copy = grads_of(copies, upstream, None if offsets is None else offsets.contiguous())
        assert torch.equal(loss, copy[0]) and torch.equal(grad, copy[1])
        strided = upstream.new_zeros(12)[::2].copy_(upstream)
        assert torch.equal(grads_of(views, strided, offsets)[1], grad)
        assert torch.equal(grads_of(views, upstream * 4, offsets)[1], grad * 4)
        assert not grads_of(views, upstream * 0, offsets)[1].any()
        mean = grads_of(views, torch.tensor(1 / 6, device=device).expand(6), offsets)[1]
        full = torch.full((6,), 1 / 6, device=device)
        assert torch.equal(mean, grads_of(views, full, offsets)[1])


def test_autograd_contract(backend, poisoned_empty):
    """Two backwards agree, a double one is refused, checkpoints and runs give the same bits."""
    name, device = backend
    for form in ("sums", "rows", "flat"):
        logps, ref_logps, good, offsets, baselines = make_responses(9, form, T=30)
        logps = logps.to(device).requires_grad_()
        ref_logps, good = ref_logps.to(device), good.to(device)
        inputs = {n: baselines[n].to(device) for n in ("kl_logps", "ref_kl_logps")}
        offsets = None if offsets is None else offsets.to(device)

        def losses(leaf, fixed=(ref_logps, good), offsets=offsets, inputs=inputs):
            return unpaired_preference_loss(
                leaf, *fixed, segment_offsets=offsets, backend=name, **inputs
            ).losses

        first = losses(logps)
        upstream = torch.ones_like(first)
        (grad,) = torch.autograd.grad(first, logps, upstream, retain_graph=True)
        kept = grad.clone()
        (twice,) = torch.autograd.grad(first, logps, upstream * 2)
        assert torch.equal(grad, kept) and torch.equal(twice, 2 * kept)
        for _ in range(2):
            again = losses(logps)
            assert torch.equal(again, first)
            assert torch.equal(torch.autograd.grad(again, logps, upstream)[0], kept)
        for use_reentrant in (False, True):
            logps.grad = None
            checkpoint(losses, logps, use_reentrant=use_reentrant).sum().backward()
            assert torch.equal(logps.grad, kept)
        with pytest.raises(RuntimeError, match="once_differentiable: double backward"):
            torch.autograd.grad(losses(logps).square().sum(), logps, create_graph=True)


def test_compile():
    """The torch backend is one graph under torch.compile, with eager's gradients."""
    for form, cases in (("sums", CASES[:1]), ("rows", CASES[:1]), ("flat", CASES)):
        logps, ref_logps, good, offsets, baselines = make_responses(5, form)
        logps.requires_grad_()

        def losses(leaf, fixed=(ref_logps, good), offsets=offsets, given=(cases, baselines)):
            outputs, (cases, baselines) = [], given
            for loss_type, sources in cases:
                inputs = {name: baselines[name] for name in sources}
                settings = {"loss_type": loss_type, "segment_offsets": offsets}
                outputs.append(unpaired_preference_loss(leaf, *fixed, **settings, **inputs).losses)
            return torch.stack(outputs)

        compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logps), losses(logps))
        grads = [torch.autograd.grad(call(logps).sum(), logps)[0] for call in (compiled, losses)]
        torch.testing.assert_close(*grads)


TWO, THREE, TOKENS = torch.zeros(2), torch.zeros(3), torch.zeros(2, 4)
GOOD, SCALAR, OFFSETS = TWO > 0, TWO[0], torch.zeros(3, dtype=torch.int64)
APO = {"loss_type": "apo_zero_unpaired"}

REFUSALS = [
    refusal(
        ValueError,
        "logps must have shape [S] or [S, T] with S=2 like is_desirable, got (3,)",
        THREE,
        THREE,
        GOOD,
        **APO,
    ),
    refusal(
        ValueError,
        "logps must have shape [S] or [S, T] with S=2 like is_desirable, got (4, 2). "
        "Flat tokens need segment_offsets.",
        TOKENS.T,
        None,
        GOOD,
        **APO,
    ),
    refusal(
        ValueError,
        "logps must have shape [S] or [S, T] with S=2 like is_desirable, got ()",
        SCALAR,
        None,
        GOOD,
        **APO,
    ),
    refusal(
        ValueError,
        "logps must have shape [N] or [B, T] with segment_offsets, got (1, 2, 4)",
        TOKENS[None],
        None,
        GOOD,
        segment_offsets=OFFSETS,
        **APO,
    ),
    refusal(
        ValueError,
        "ref_logps must have shape (2, 4) like logps or [S], got (3,)",
        TOKENS,
        THREE,
        GOOD,
        **APO,
    ),
    refusal(
        ValueError,
        "segment_offsets must have shape [S + 1] with S=2 like is_desirable, got (2,)",
        TOKENS,
        None,
        GOOD,
        segment_offsets=OFFSETS[:2],
        **APO,
    ),
    refusal(
        ValueError, "is_desirable must have shape [S], got (1, 2)", TWO, None, GOOD[None], **APO
    ),
    refusal(TypeError, "is_desirable must have dtype bool, got float32", TWO, None, TWO, **APO),
    refusal(
        TypeError,
        "segment_offsets must have dtype int64, got int32",
        TOKENS,
        None,
        GOOD,
        segment_offsets=OFFSETS.int(),
        **APO,
    ),
    refusal(
        ValueError,
        "kl_logps must be given for loss_type='kto', got None. Pass kl_logps and ref_kl_logps, or "
        "their mean over all ranks as kl.",
        TWO,
        None,
        GOOD,
    ),
    refusal(
        ValueError,
        "ref_kl_logps must be given for loss_type='kto', got None. Pass kl_logps and "
        "ref_kl_logps, or their mean over all ranks as kl.",
        TWO,
        None,
        GOOD,
        kl_logps=THREE,
    ),
    refusal(
        ValueError,
        "kl must be None where kl_logps is given, got a value",
        TWO,
        None,
        GOOD,
        kl=SCALAR,
        kl_logps=THREE,
        ref_kl_logps=THREE,
    ),
    refusal(
        ValueError,
        "kl must be None for loss_type='bco', got a value",
        TWO,
        None,
        GOOD,
        loss_type="bco",
        kl=SCALAR,
    ),
    refusal(
        ValueError,
        "reward_shift must be None for loss_type='kto', got a value",
        TWO,
        None,
        GOOD,
        kl=SCALAR,
        reward_shift=SCALAR,
    ),
    refusal(
        ValueError,
        "ref_kl_logps must have shape [M] with M=3 like kl_logps, got (2,)",
        TWO,
        None,
        GOOD,
        kl_logps=THREE,
        ref_kl_logps=TWO,
    ),
    refusal(ValueError, "kl must have shape [], got (1,)", TWO, None, GOOD, kl=TWO[:1]),
    refusal(TypeError, "kl must be a tensor, got float", TWO, None, GOOD, kl=0.5),
    refusal(
        ValueError,
        "loss_type must be one of 'apo_zero_unpaired', 'bco', 'kto', got 'dpo'",
        TWO,
        None,
        GOOD,
        loss_type="dpo",
    ),
    refusal(ValueError, "beta must be a finite float > 0, got 0", TWO, None, GOOD, beta=0, **APO),
    refusal(
        TypeError,
        "logps must have dtype bfloat16, float16, float32, float64, got int64",
        OFFSETS[:2],
        None,
        GOOD,
        **APO,
    ),
    refusal(
        ValueError,
        "is_desirable must be on {device} like logps, got meta",
        TWO,
        None,
        GOOD.to("meta"),
        **APO,
    ),
    *(
        refusal(
            TypeError,
            f"{name} must be a Python float, got bool",
            TWO,
            None,
            GOOD,
            **{name: True},
            **APO,
        )
        for name in RANGES
    ),
]


@pytest.mark.parametrize(REFUSAL, REFUSALS)
def test_errors(backend, error, text, args, settings):
    """Shapes, dtypes, devices, settings: one sentence for each mistake."""
    assert_refused(unpaired_preference_loss, backend, error, text, args, settings)


def test_every_parameter_has_a_range():
    assert list(RANGES) == [parameter.name for parameter in UNPAIRED_PARAMETERS]


@pytest.mark.parametrize("parameter", UNPAIRED_PARAMETERS, ids=lambda row: row.name)
def test_ranges(backend, parameter):
    """A value just outside is refused, the ends that belong to the range are taken."""
    name, device = backend
    tensors = TWO.to(device), None, GOOD.to(device)
    refused, taken = ends_of(RANGES[parameter.name])
    for value in refused:
        with pytest.raises(ValueError) as raised:
            unpaired_preference_loss(*tensors, **APO, **{parameter.name: value}, backend=name)
        text = f"{parameter.name} must {parameter.requirement}, got {value}"
        assert str(raised.value) == f"unpaired_preference_loss: {text}"
    for value in taken:
        out = unpaired_preference_loss(*tensors, **APO, **{parameter.name: value}, backend=name)
        assert out.losses.isfinite().all()


@pytest.mark.parametrize("fields", [("logps",), ("ref_logps",), ("kl",)], ids=str)
def test_no_fp64_on_triton(backend, fields):
    tensors = {"logps": TWO, "ref_logps": TWO, "kl": SCALAR, "is_desirable": GOOD}
    assert_no_fp64_on_triton(unpaired_preference_loss, backend, tensors, *fields)


TRL_TYPES = ("kto", "apo_zero_unpaired")


@pytest.mark.parametrize("loss_type", TRL_TYPES)
@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 1], [1] * 5, [0] * 5], ids=str)
def test_agrees_with_trl(backend, loss_type, labels):
    """The batch loss and its gradient are those of TRL's own KTOTrainer on the same log-probs."""
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
    name, device = backend
    S, T = 5, 9
    generator = torch.Generator().manual_seed(5)
    mask = torch.zeros(S, T, dtype=torch.int64)
    for row, length in enumerate(torch.randint(1, T - 1, (S,), generator=generator).tolist()):
        mask[row, T - length :] = 1
    # TRL's mask covers the ids, whose log-probs start one position later
    logps = -torch.rand(S, T - 1, generator=generator) * 3 * mask[:, 1:]
    kl_tokens = -torch.rand(S, T - 1, generator=generator) * 3 * mask[:, 1:]
    refs = -torch.rand(2, S, generator=generator) * 3 * mask.sum(1)
    weights = {"desirable_weight": 1.33, "undesirable_weight": 0.8}

    leaf = logps.clone().requires_grad_()
    zeros = torch.zeros_like(logps)

    def model(input_ids, **kwargs):
        tokens = kl_tokens if input_ids.any() else leaf
        return SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda t: t),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=0.1,
        **weights,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda *args: kto_trainer.KTOTrainer._compute_kl_logps(
        trainer, *args
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.ones_like(mask),
        "KL_attention_mask": torch.ones_like(mask),
        "KL_completion_mask": mask,
        "label": torch.tensor(labels, dtype=torch.bool),
        "ref_logps": refs[0],
        "ref_KL_logps": refs[1],
    }
    expected = kto_trainer.KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    expected.backward()

    ours = logps.to(device).requires_grad_()
    samples = {"kl_logps": kl_tokens.sum(1).to(device), "ref_kl_logps": refs[1].to(device)}
    out = unpaired_preference_loss(
        ours,
        refs[0].to(device),
        torch.tensor(labels, dtype=torch.bool, device=device),
        loss_type=loss_type,
        beta=0.1,
        backend=name,
        **weights,
        **(samples if loss_type == "kto" else {}),
    )
    out.losses.mean().backward()
    torch.testing.assert_close(out.losses.mean().cpu(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.cpu(), leaf.grad, rtol=1e-5, atol=1e-7)
    metrics = trainer._metrics["train"]
    assert metrics["kl"] == [pytest.approx(out.kl.item(), rel=1e-6)]
    for side, wanted in (("rewards/chosen", True), ("rewards/rejected", False)):
        picked = out.rewards[torch.tensor(labels, dtype=torch.bool, device=device) == wanted]
        if picked.numel():
            assert metrics[side] == [pytest.approx(picked.mean().item(), rel=1e-5)]


def test_agrees_with_liger(backend):
    """Liger's chunked KTO on hidden states has our loss and gradient of its own log-probs."""
    kto_loss = pytest.importorskip("liger_kernel.chunked_loss.kto_loss")
    name, device = backend
    S, T, H, V = 4, 6, 8, 13
    generator = torch.Generator().manual_seed(7)
    hidden, ref_hidden = torch.randn(2, S, T, H, generator=generator)
    weight, ref_weight = torch.randn(2, V, H, generator=generator)
    target = torch.randint(0, V, (S, T), generator=generator)
    target[0, 3:] = -100
    good = torch.tensor([True, False, True, False])
    kl = torch.tensor(0.7)

    leaf = hidden.clone().requires_grad_()
    op = kto_loss.LigerFusedLinearKTOLoss(beta=0.1, compiled=False, use_ref_model=True)
    expected, *_ = op(
        leaf,
        weight,
        target,
        preference_labels=good,
        ref_input=ref_hidden,
        ref_weight=ref_weight,
        kl=kl,
    )
    expected.backward()

    def logps_of(states, head):
        logps = torch.log_softmax(states @ head.T, dim=-1)
        picked = logps.gather(2, target.clamp(min=0)[:, :, None]).squeeze(2)
        return (picked * (target != -100)).to(device)

    ours = hidden.clone().requires_grad_()
    out = unpaired_preference_loss(
        logps_of(ours, weight),
        logps_of(ref_hidden, ref_weight),
        good.to(device),
        kl=kl.to(device),
        backend=name,
    )
    out.losses.mean().backward()
    torch.testing.assert_close(out.losses.mean().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, leaf.grad, rtol=1e-4, atol=1e-6)


def test_every_type_of_a_peer_is_here():
    """A row of the table names a peer exactly where a test above compares it with that peer."""
    named = {
        peer: {row.name for row in UNPAIRED_LOSS_TYPES if peer in row.peers}
        for peer in ("TRL", "Liger")
    }
    assert named == {"TRL": set(TRL_TYPES), "Liger": {"kto"}}
