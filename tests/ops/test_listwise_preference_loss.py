"""``listwise_preference_loss``: both backends against the fp64 oracle, the paper, edges."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from spo_kernels import listwise_preference_loss
from spo_kernels.calls.loss_table import LISTWISE_LOSS_TYPES, LISTWISE_PARAMETERS
from spo_kernels.reference.listwise_preference_loss import listwise_preference_loss_reference
from tests.helpers.oracle import assert_within_budget
from tests.helpers.range_cases import ends_of
from tests.helpers.refusals import REFUSAL, assert_no_fp64_on_triton, assert_refused, refusal

NAMES = tuple(row.name for row in LISTWISE_LOSS_TYPES)
NDCG, PAIRS = ("neural_ndcg", "approx_ndcg"), ("lipo_lambda", "all_pairs", "best_vs_rest")
# around BLOCK_K = 16 and the largest list
list_lengths = st.one_of(st.sampled_from([2, 15, 16, 17]), st.integers(3, 12))


def make_lists(B, K, *, dtype=torch.float32, seed=0, scale=8.0, masked=False):
    """Random log-probs, labels in random order with some ties, and a mask with gaps or None."""
    generator = torch.Generator().manual_seed(seed)
    base = -100.0 * torch.rand(B, K, generator=generator)
    moved = base + scale * torch.randn(B, K, generator=generator)
    labels = torch.rand(B, K, generator=generator)
    labels[:, ::2] = labels[:, ::2].round(decimals=1)
    mask = torch.rand(B, K, generator=generator) < 0.7 if masked else None
    return moved.to(dtype), labels, base.to(dtype), mask


def run(call, logps, labels, ref_logps, mask, upstream, **settings):
    """Return the outputs and the gradient under ``upstream``, by name."""
    leaf = logps.clone().requires_grad_()
    out = call(leaf, labels, ref_logps, mask=mask, **settings)
    out = dict(out) if isinstance(out, dict) else out._asdict()
    out["losses"].backward(upstream.to(out["losses"].device, out["losses"].dtype))
    return {**out, "grad_logps": leaf.grad}


def compare(backend, tensors, upstream, **settings):
    """Hold every output and the gradient of ``backend`` to the budget."""
    name, device = backend
    reference = listwise_preference_loss_reference
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    oracle = run(reference, *wide, upstream.double(), **settings)
    # the reference rounds nothing to half precision but the gradient
    narrow = [t.float() if t is not None and t.is_floating_point() else t for t in tensors]
    eager = run(reference, *narrow, upstream, **settings)
    eager["grad_logps"] = eager["grad_logps"].to(tensors[0].dtype)
    moved = [None if t is None else t.to(device) for t in tensors]
    actual = run(listwise_preference_loss, *moved, upstream, **settings, backend=name)
    assert torch.equal(actual.pop("counted").cpu(), oracle["counted"])
    for field, value in actual.items():
        label = f"listwise_preference_loss[{name}].{field} {settings}"
        assert_within_budget(label, value, eager[field], oracle[field])
    return actual


@pytest.mark.parametrize("loss_type", NAMES)
@settings(max_examples=4)
# an empty batch never launches
@example(B=0, K=5, beta=0.1, seed=0, masked=False, dtype=torch.float32, has_ref=True)
@example(B=1, K=64, beta=0.1, seed=1, masked=True, dtype=torch.float32, has_ref=True)
@given(
    B=st.integers(1, 3),
    K=list_lengths,
    beta=st.sampled_from([0.01, 0.1, 2.0]),
    seed=st.integers(0, 99),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    has_ref=st.booleans(),
)
def test_forward_and_gradients(backend, loss_type, B, K, beta, seed, masked, dtype, has_ref):
    """Every type on ragged lists in any label order, under a random upstream."""
    logps, labels, ref_logps, mask = make_lists(B, K, dtype=dtype, seed=seed, masked=masked)
    upstream = torch.randn(B, generator=torch.Generator().manual_seed(seed))
    ref_logps = ref_logps if has_ref else None
    compare(backend, (logps, labels, ref_logps, mask), upstream, loss_type=loss_type, beta=beta)


@pytest.mark.parametrize(
    ("settings", "loss", "grad"),
    [
        # the design's vectors, with the digits that autograd of the formulas gives in fp64; there
        # the first one's Sinkhorn stopped at 1e-6, which is 2e-7 away
        ({}, -0.886384, [-0.00882550, -0.00299285, 0.00642661, 0.00539174]),
        (
            {"ndcg_temperature": 0.1},
            -0.935577,
            [-0.0274670, -0.00280233, 0.0290063, 0.00126306],
        ),
        (
            {"loss_type": "approx_ndcg"},
            -0.945324,
            [-0.0575802, -2.97233e-6, 0.0575332, 5.00099e-5],
        ),
    ],
)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]], ids=str)
def test_paper_values(backend, settings, loss, grad, order):
    """OPO's worked list (arXiv:2410.04346), its labels sorted and not."""
    name, device = backend
    d = torch.tensor([[3.0, -1.0, 2.0, -4.0]])[:, order]
    psi = torch.tensor([[0.9, 0.7, 0.4, 0.1]])[:, order]
    expected = torch.tensor([grad], dtype=torch.float64)[:, order]
    one = torch.ones(1)
    wide, moved = (d.double(), psi.double()), (d.to(device), psi.to(device))
    reference, op = listwise_preference_loss_reference, listwise_preference_loss
    for out in (
        run(reference, *wide, None, None, one, **settings),
        run(op, *moved, None, None, one, **settings, backend=name),
    ):
        assert out["losses"].item() == pytest.approx(loss, abs=6e-7)
        torch.testing.assert_close(out["grad_logps"].cpu().double(), expected, rtol=1e-5, atol=0)


def test_reference_and_table(backend):
    """Values computed by hand, every row of the table served, and gradients by differences."""
    name, device = backend
    # y = (0.5, -0.2, 0), psi says 2 is best, 0 and 1 tie
    d = torch.tensor([[5.0, -2.0, 0.0]])
    psi = torch.tensor([[1.0, 1.0, 2.0]])

    def sp(t):
        return math.log1p(math.exp(t))

    gain, ideal = (1.0, 1.0, 3.0), 3.0 + 1.0 / math.log2(3) + 0.5
    by_y = {0: 1.0, 2: 1.0 / math.log2(3), 1: 0.5}
    by_hand = {
        # at a small temperature or a large alpha both are the NDCG of the order by y
        "neural_ndcg": -sum(gain[i] * by_y[i] for i in range(3)) / ideal,
        "approx_ndcg": -sum(gain[i] * by_y[i] for i in range(3)) / ideal,
        "lipo_lambda": 2.0 * ((1.0 - by_y[2]) * sp(0.5) + (by_y[2] - 0.5) * sp(-0.2)),
        # 2, then 0 before 1
        "list_mle": math.log(1 + math.exp(0.5) + math.exp(-0.2)) + sp(-0.7),
        "all_pairs": (sp(0.5) + sp(-0.2)) / 2,
        "best_vs_rest": (sp(0.5) + sp(-0.2)) / 2,
    }
    assert set(by_hand) == set(NAMES)
    sharp = {"ndcg_temperature": 1e-3, "ndcg_alpha": 1e3}
    one = torch.ones(1)
    for loss_type, value in by_hand.items():
        settings = {**sharp, "loss_type": loss_type}
        out = run(listwise_preference_loss_reference, d.double(), psi, None, None, one, **settings)
        assert out["losses"].item() == pytest.approx(value, rel=1e-12)
        args = (d.to(device), psi.to(device), None, None, one)
        out = run(listwise_preference_loss, *args, backend=name, **settings)
        assert out["losses"].item() == pytest.approx(value, rel=1e-6)
    # two responses are DPO's pair
    pair = [torch.tensor(t, device=device) for t in ([[3.0, -1.0]], [[2.0, 1.0]])]
    for loss_type in ("list_mle", "all_pairs", "best_vs_rest"):
        out = listwise_preference_loss(*pair, loss_type=loss_type, backend=name)
        assert out.losses.item() == pytest.approx(sp(-0.4), rel=1e-6)

    assert {row.name for row in LISTWISE_PARAMETERS} == {"beta", "ndcg_temperature", "ndcg_alpha"}
    if name == "triton":
        return
    logps, labels, ref_logps, mask = make_lists(2, 5, dtype=torch.float64, seed=3, masked=True)
    logps.requires_grad_()
    for call in (listwise_preference_loss_reference, listwise_preference_loss):
        for loss_type in NAMES:
            # lambda weights and ApproxNDCG's ranks are smooth only away from ties of y
            settings = {"loss_type": loss_type, "ndcg_alpha": 2.0}

            def losses(leaf, call=call, settings=settings):
                out = call(leaf, labels.double(), ref_logps, mask=mask, **settings)
                return out["losses"] if isinstance(out, dict) else out.losses

            assert torch.autograd.gradcheck(losses, logps)


def test_padding_changes_nothing(backend):
    """A list with gaps and a padded tail has the loss and gradient of the list without them."""
    name, device = backend
    logps, labels, ref_logps, _ = make_lists(3, 6, seed=11)
    slots = [0, 2, 3, 7, 8, 17]
    one = torch.ones(3)
    garbage = {"logps": math.nan, "labels": -1.0, "ref_logps": math.inf}
    padded = []
    for tensor, value in zip((logps, labels, ref_logps), garbage.values(), strict=True):
        wide = torch.full((3, 19), value)
        wide[:, slots] = tensor
        padded.append(wide.to(device))
    tensors = [t.to(device) for t in (logps, labels, ref_logps)]
    # the authors mark padding by the label
    mask = padded[1] != -1.0
    for loss_type in NAMES:
        settings = {"loss_type": loss_type, "backend": name}
        plain = run(listwise_preference_loss, *tensors, None, one, **settings)
        wide = run(listwise_preference_loss, *padded, mask, one, **settings)
        torch.testing.assert_close(wide["losses"], plain["losses"], rtol=1e-6, atol=1e-7)
        for field in ("grad_logps", "rewards"):
            torch.testing.assert_close(wide[field][:, slots], plain[field], rtol=2e-5, atol=1e-8)
            assert not wide[field][~mask].any(), field


def test_lists_that_do_not_count(backend):
    """No ideal DCG, one response or none, nothing but ties: loss 0, gradient 0, not counted."""
    name, device = backend
    logps = torch.tensor([[1.0, 2.0, 3.0]] * 5)
    labels = torch.tensor([[0.0, 0, 0], [-1, -2, -3], [1, 2, 3], [1, 2, 3], [2, 2, 2]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    expected = {
        **dict.fromkeys(NDCG, [False, False, False, False, True]),
        **dict.fromkeys(PAIRS, [False, True, False, False, False]),
        "list_mle": [True, True, False, False, True],
    }
    for loss_type in NAMES:
        tensors = [t.to(device) for t in (logps, labels)]
        settings = {"loss_type": loss_type, "backend": name}
        out = run(
            listwise_preference_loss, *tensors, None, mask.to(device), torch.ones(5), **settings
        )
        counted = out["counted"].tolist()
        assert counted == expected[loss_type], loss_type
        assert out["counted"].dtype == torch.bool
        for row, counts in enumerate(counted):
            if not counts:
                assert out["losses"][row].item() == 0.0
                assert not out["grad_logps"][row].any()


def test_needs_input_grad(backend):
    """Frozen log-probs get no gradient and the values keep their bits."""
    name, device = backend
    logps, labels, ref_logps, _ = (None if t is None else t.to(device) for t in make_lists(3, 5))
    values = []
    for needs in (True, False):
        leaf = logps.clone().requires_grad_(needs)
        out = listwise_preference_loss(leaf, labels, ref_logps, loss_type="list_mle", backend=name)
        assert out.losses.requires_grad == needs
        assert not out.rewards.requires_grad and not out.counted.requires_grad
        values.append(out.losses.detach())
    assert torch.equal(*values)
    leaves = [t.clone().requires_grad_() for t in (logps, labels, ref_logps)]
    listwise_preference_loss(*leaves, backend=name).losses.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False]


@pytest.mark.parametrize("loss_type", NAMES)
def test_edges(backend, poisoned_empty, loss_type):
    """Empty, all masked, NaN in its own list, fp16 extremes, large labels."""
    name, device = backend

    def losses(rows, labels, dtype=torch.float32, **settings):
        leaf = torch.tensor(rows, dtype=dtype, device=device).reshape(len(rows), -1)
        leaf.requires_grad_()
        psi = torch.tensor(labels, device=device).expand_as(leaf)
        out = listwise_preference_loss(leaf, psi, loss_type=loss_type, backend=name, **settings)
        out.losses.sum().backward()
        return out, leaf.grad

    # every token ignored: all scores are 0, and the loss stays connected
    out, grad = losses([[0.0, 0.0, 0.0]], [2.0, 0.0, 1.0])
    assert out.losses.isfinite().all() and grad.isfinite().all() and grad.any()
    nothing = torch.zeros(2, 3, dtype=torch.bool, device=device)
    out, grad = losses([[1.0, 2.0, 3.0]] * 2, [2.0, 0.0, 1.0], mask=nothing)
    assert not out.losses.any() and not grad.any() and not out.counted.any()
    for bad in (math.nan, math.inf, -math.inf):
        out, grad = losses([[1.0, 2.0, 3.0], [1.0, bad, 2.0], [3.0, 2.0, 1.0]], [2.0, 0.0, 1.0])
        assert out.losses.isnan().tolist() == [False, True, False] and out.counted.all()
        assert grad[[0, 2]].isfinite().all() and grad[1].isnan().all()
    for bad in (math.nan, math.inf):
        out, grad = losses([[1.0, 2.0, 3.0]], [2.0, bad, 1.0])
        assert out.losses.isnan().all() and out.counted.all()
    out, grad = losses([[-65504.0, 65504.0, 0.0]], [2.0, 0.0, 1.0], dtype=torch.float16, beta=0.01)
    assert out.losses.isfinite().all() and grad.isfinite().all()
    for temperature in (0.01, 1.0):
        rows = [[1e4, -1e4, 0.0, 1e4], [-1e4, 1e4, 0.0, 5.0]]
        out, grad = losses(rows, [0.9, 0.1, 0.4, 0.7], ndcg_temperature=temperature)
        assert out.losses.isfinite().all() and grad.isfinite().all()
    # one gain alone is left where the labels are far apart, and none overflows
    out, grad = losses([[1.0, 2.0, 0.0]], [100.0, 0.0, 50.0])
    assert out.losses.isfinite().all() and grad.isfinite().all()
    if loss_type in NDCG:
        out, grad = losses([[1.0, 2.0, 0.0]], [1000.0, 0.0, 998.0])
        same, same_grad = losses([[1.0, 2.0, 0.0]], [40.0, 0.0, 38.0])
        torch.testing.assert_close(out.losses, same.losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, same_grad, rtol=1e-5, atol=0)
        # gains near 0 keep their digits
        out, _ = losses([[1.0, 2.0, 0.0]], [2e-9, 0.0, 1e-9])
        half, _ = losses([[1.0, 2.0, 0.0]], [2e-4, 0.0, 1e-4])
        assert out.counted.all()
        torch.testing.assert_close(out.losses, half.losses, rtol=1e-4, atol=0)
    empty = torch.zeros(0, 4, device=device, requires_grad=True)
    out = listwise_preference_loss(empty, empty.detach(), loss_type=loss_type, backend=name)
    out.losses.sum().backward()
    assert out.losses.shape == out.counted.shape == (0,) and empty.grad.shape == (0, 4)


def test_ties(backend):
    """Equal scores and labels: equal gradients from NDCG, no pair between tied labels."""
    name, device = backend
    logps = torch.tensor([[1.0, 1.0, 1.0, -2.0]], device=device, requires_grad=True)
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0]], device=device)
    for loss_type in (*NDCG, "all_pairs"):
        out = listwise_preference_loss(logps, labels, loss_type=loss_type, backend=name)
        (grad,) = torch.autograd.grad(out.losses.sum(), logps)
        assert grad[0, 0].item() == pytest.approx(grad[0, 1].item(), rel=1e-4)
    # four pairs, two of them level
    expected = (2 * math.log(2.0) + 2 * math.log1p(math.exp(-0.3))) / 4
    assert out.losses.item() == pytest.approx(expected, rel=1e-6)


def test_noncontiguous(backend):
    """Views give the bits of their copies; linear in any upstream, also one of stride 0."""
    name, device = backend
    base = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).to(device) * 9
    views = [base[::2, ::4], base.T[:10, :3].T.abs(), base[0, 5].expand(3, 10)]
    mask = (base > -5.0)[:3, ::4]

    def grads_of(tensors, mask, upstream):
        leaf = tensors[0].detach().requires_grad_()
        loss = listwise_preference_loss(
            leaf, *tensors[1:], mask=mask, loss_type="approx_ndcg", backend=name
        ).losses
        return loss, torch.autograd.grad(loss, leaf, upstream)[0]

    upstream = torch.randn(3, generator=torch.Generator().manual_seed(4)).to(device)
    loss, grad = grads_of(views, mask, upstream)
    copy = grads_of([t.contiguous() for t in views], mask.contiguous(), upstream)
    assert torch.equal(loss, copy[0]) and torch.equal(grad, copy[1])
    strided = upstream.new_zeros(6)[::2].copy_(upstream)
    assert torch.equal(grads_of(views, mask, strided)[1], grad)
    assert torch.equal(grads_of(views, mask, upstream * 4)[1], grad * 4)
    assert not grads_of(views, mask, upstream * 0)[1].any()
    mean = grads_of(views, mask, torch.tensor(1 / 3, device=device).expand(3))[1]
    assert torch.equal(mean, grads_of(views, mask, torch.full((3,), 1 / 3, device=device))[1])


def test_autograd_contract(backend, poisoned_empty):
    """Two backwards agree, a double one is refused, checkpoints and runs give the same bits."""
    name, device = backend
    logps, labels, ref_logps, mask = (t.to(device) for t in make_lists(3, 17, masked=True))
    logps.requires_grad_()
    for loss_type in NAMES:

        def losses(leaf, loss_type=loss_type):
            return listwise_preference_loss(
                leaf, labels, ref_logps, mask=mask, loss_type=loss_type, backend=name
            ).losses

        first = losses(logps)
        upstream = torch.ones_like(first)
        (grad,) = torch.autograd.grad(first, logps, upstream, retain_graph=True)
        kept = grad.clone()
        (twice,) = torch.autograd.grad(first, logps, upstream * 2)
        assert torch.equal(grad, kept) and torch.equal(twice, 2 * kept)
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
    logps, labels, ref_logps, mask = make_lists(3, 5, masked=True)
    logps.requires_grad_()

    def losses(leaf):
        outputs = [
            listwise_preference_loss(leaf, labels, ref_logps, mask=mask, loss_type=name).losses
            for name in NAMES
        ]
        return torch.stack(outputs)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logps), losses(logps))
    grads = [torch.autograd.grad(call(logps).sum(), logps)[0] for call in (compiled, losses)]
    torch.testing.assert_close(*grads)


LISTS = torch.zeros(2, 3)

REFUSALS = [
    refusal(ValueError, "logps must have shape [B, K], got (3,)", LISTS[0], LISTS[0]),
    refusal(
        ValueError,
        "labels must have shape [B, K] with B=2, K=3 like logps, got (2, 2)",
        LISTS,
        LISTS[:, :2],
    ),
    refusal(
        ValueError,
        "ref_logps must have shape [B, K] with B=2, K=3 like logps, got (2, 2)",
        LISTS,
        LISTS,
        LISTS[:, :2],
    ),
    refusal(
        ValueError,
        "mask must have shape [B, K] with B=2, K=3 like logps, got (2, 2)",
        LISTS,
        LISTS,
        mask=LISTS[:, :2] > 0,
    ),
    refusal(
        ValueError,
        "loss_type must be one of 'all_pairs', 'approx_ndcg', 'best_vs_rest', 'lipo_lambda', "
        "'list_mle', 'neural_ndcg', got 'ndcg'",
        LISTS,
        LISTS,
        loss_type="ndcg",
    ),
    refusal(ValueError, "beta must be a finite float > 0, got 0", LISTS, LISTS, beta=0),
    refusal(TypeError, "labels must be a tensor, got list", LISTS, [[0.0] * 3] * 2),
    refusal(
        TypeError,
        "labels must have dtype bfloat16, float16, float32, float64, got int64",
        LISTS,
        LISTS.long(),
    ),
    refusal(TypeError, "mask must have dtype bool, got float32", LISTS, LISTS, mask=LISTS),
    refusal(
        ValueError,
        "labels must be on {device} like logps, got meta",
        LISTS,
        LISTS.to("meta"),
    ),
    *(
        refusal(
            ValueError,
            f"logps must have 2 to 64 columns (responses K), got {K}",
            torch.zeros(2, K),
            torch.zeros(2, K),
        )
        for K in (1, 65)
    ),
    *(
        refusal(
            ValueError,
            f"{parameter.name} must be a finite float > 0, got {value}",
            LISTS,
            LISTS,
            **{parameter.name: value},
        )
        for parameter in LISTWISE_PARAMETERS
        for value in ends_of("(0, inf)")[0]
    ),
    *(
        refusal(
            TypeError,
            f"{parameter.name} must be a Python float, got Tensor",
            LISTS,
            LISTS,
            **{parameter.name: LISTS[0, 0]},
        )
        for parameter in LISTWISE_PARAMETERS
    ),
]


@pytest.mark.parametrize(REFUSAL, REFUSALS)
def test_errors(backend, error, text, args, settings):
    """Shapes, dtypes, devices, settings: one sentence for each mistake."""
    assert_refused(listwise_preference_loss, backend, error, text, args, settings)


@pytest.mark.parametrize("fields", [("logps",), ("labels",), ("ref_logps",)], ids=str)
def test_no_fp64_on_triton(backend, fields):
    tensors = dict.fromkeys(("logps", "labels", "ref_logps"), LISTS)
    assert_no_fp64_on_triton(listwise_preference_loss, backend, tensors, *fields)


def test_fp64_on_torch():
    out = listwise_preference_loss(LISTS.double(), LISTS, backend="torch")
    assert out.losses.dtype == out.rewards.dtype == torch.float64
