"""``degree_loss``: both backends against the fp64 reference, values by hand, and edges."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from spo_kernels import degree_loss
from spo_kernels.reference.degree_loss import degree_loss_reference
from tests.helpers.oracle import assert_within_budget, order_spread
from tests.helpers.refusals import REFUSAL, assert_no_fp64_on_triton, assert_refused, refusal

BLOCK_N, BLOCK_H = 32, 128
GRADS = ("grad_hidden", "grad_head_weight", "grad_head_bias")


def make_batch(lengths, H, K, *, dtype=torch.float32, seed=0, before=0, after=0):
    """Random hidden states of segments of ``lengths`` rows, with rows outside every segment."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([before, *lengths]).cumsum(0)
    N = int(offsets[-1]) + after
    return {
        "hidden": torch.randn(N, H, generator=generator).to(dtype),
        "removal_levels": torch.randint(-1, K, (N,), generator=generator).to(torch.int8),
        "segment_offsets": offsets,
        "head_weight": torch.randn(K, H, generator=generator).to(dtype),
        "head_bias": torch.randn(K, generator=generator).to(dtype),
    }


def run(call, batch, upstream, **settings):
    """Return the outputs and the three gradients under ``upstream``, by name."""
    names = ("hidden", "head_weight", "head_bias")
    leaves = {n: t.clone().requires_grad_() if n in names else t for n, t in batch.items()}
    out = call(**leaves, **settings)
    out = out if isinstance(out, dict) else out._asdict()
    losses = out["losses"]
    # the reference's loss of a batch without key content is a constant, the op's never is
    if losses.requires_grad or call is not degree_loss_reference:
        losses.backward(upstream.to(losses.device, losses.dtype))
    grads = {f"grad_{n}": leaves[n].grad for n in names if n in leaves}
    if call is degree_loss_reference:
        zeros = {f"grad_{n}": torch.zeros_like(leaves[n]) for n in names if n in leaves}
        grads = {n: zeros[n] if g is None else g for n, g in grads.items()}
    return {**out, **grads}


def compare(backend, batch, *, center_views=False):
    """Hold every output and gradient of ``backend`` to the budget and return them."""
    name, device = backend
    upstream = torch.randn(
        batch["segment_offsets"].numel() - 1, generator=torch.Generator().manual_seed(9)
    )
    double = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    oracle = run(degree_loss_reference, double, upstream, center_views=center_views)
    eager = run(degree_loss_reference, batch, upstream, center_views=center_views)
    on_device = {n: t.to(device) for n, t in batch.items()}
    actual = run(degree_loss, on_device, upstream, center_views=center_views, backend=name)
    for field in ("counted_views", "view_mask"):
        assert torch.equal(actual[field].cpu(), oracle[field]), field
        assert actual[field].dtype == oracle[field].dtype
    # a near tie may round either way, so the fp64 argmax binds up to one view of all
    assert (actual["correct_views"].cpu() - oracle["correct_views"]).abs().sum() <= 1
    for field in ("losses", *(g for g in GRADS if g in actual)):

        def spread(field=field):
            def output_of(moved):
                return run(degree_loss_reference, moved, upstream, center_views=center_views)[field]

            return order_spread(output_of, double, terms=max(batch["hidden"].shape))

        label = f"degree_loss[{name}].{field}"
        assert_within_budget(label, actual[field].cpu(), eager[field], oracle[field], spread)
    return actual


segment_lengths = st.lists(
    st.one_of(st.sampled_from([0, 1, BLOCK_N - 1, BLOCK_N, BLOCK_N + 1]), st.integers(0, 50)),
    max_size=5,
)


@pytest.mark.parametrize(
    ("dtype", "center_views"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.float16, False),
    ],
    ids=str,
)
@settings(max_examples=3)
# rows in no segment on both sides of empty first and last ones, and a block met by many segments
@example(lengths=[0, 3, 0, 0, 40, 0], K=5, H=BLOCK_H + 1, before=7, after=9, seed=1)
# more rows than a block of the partial sums holds, so one segment adds up several of them
@example(lengths=[75, 1], K=4, H=16, before=0, after=0, seed=2)
@example(lengths=[], K=2, H=3, before=4, after=0, seed=3)
@given(
    lengths=segment_lengths,
    K=st.sampled_from([2, 3, 4, 15, 16]),
    H=st.sampled_from([1, 31, BLOCK_H - 1, BLOCK_H, 2 * BLOCK_H + 3]),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_forward_and_gradients(backend, dtype, center_views, lengths, K, H, before, after, seed):
    """Ragged shapes, K from 2 to 16, empty segments, under a random upstream."""
    batch = make_batch(lengths, H, K, dtype=dtype, seed=seed, before=before, after=after)
    compare(backend, batch, center_views=center_views)


def test_reference_by_hand():
    """The oracle and the torch backend have hand-computed values and pass gradcheck."""
    hidden = torch.tensor([[9.0], [3.0], [5.0], [1.0], [7.0]], dtype=torch.float64)
    levels = torch.tensor([-1, 0, 1, 2, 0], dtype=torch.int8)
    offsets = torch.tensor([0, 4, 5])
    weight = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    # the views of segment 0 pool (3 + 5 + 1) / 3, (3 + 1) / 2 and 3; segment 1 has no key content
    views = [3.0, 2.0, 3.0]
    per_view = [math.log(math.exp(x) + 2.0) - (x if k == 1 else 0.0) for k, x in enumerate(views)]
    centred = [x - 8.0 / 3.0 for x in views]
    per_centred = [
        math.log(math.exp(x) + 2.0) - (x if k == 1 else 0.0) for k, x in enumerate(centred)
    ]
    for call in (degree_loss_reference, degree_loss):
        for center, values in ((False, per_view), (True, per_centred)):
            out = call(hidden, levels, offsets, weight, center_views=center)
            out = out if isinstance(out, dict) else out._asdict()
            assert out["losses"].tolist() == pytest.approx([sum(values) / 3, 0.0], rel=1e-12)
            assert out["counted_views"].tolist() == [3, 0]
            assert out["view_mask"].tolist() == [[True] * 3, [False] * 3]
        assert call(hidden, levels, offsets, weight)[
            "correct_views" if call is degree_loss_reference else 1
        ].tolist() == [1, 0]

    batch = make_batch([5, 0, 3], 2, 3, dtype=torch.float64, before=1)
    names = ("hidden", "head_weight", "head_bias")
    leaves = [batch[n].requires_grad_() for n in names]
    for call in (degree_loss_reference, degree_loss):
        for center in (False, True):

            def losses(hidden, weight, bias, call=call, center=center):
                plan = batch["removal_levels"], batch["segment_offsets"]
                out = call(hidden, *plan, weight, bias, center_views=center)
                return out["losses"] if isinstance(out, dict) else out.losses

            assert torch.autograd.gradcheck(losses, leaves)


def test_views_left_out(backend):
    """A level without rows, a view without rows, and a response without key content."""
    name, device = backend

    def views_of(levels, K=4):
        batch = make_batch([len(levels)], 6, K)
        batch["removal_levels"] = torch.tensor(levels, dtype=torch.int8)
        out = compare((name, device), batch)
        return out["view_mask"][0].tolist(), out["counted_views"].item(), out

    # nothing has level 2: view 2 equals view 1
    assert views_of([0, 1, 3, 3])[:2] == ([True, True, False, True], 3)
    # the whole response is key content: the last view keeps no row
    assert views_of([1, 2, 3, 1])[:2] == ([True, True, True, False], 3)
    assert views_of([2, 2])[:2] == ([True, False, False, False], 1)
    for levels in ([0, 0, 0], [-1, -1], [-1, 0]):
        mask, counted, out = views_of(levels)
        assert not any(mask) and counted == 0 and out["losses"].item() == 0.0
        # the loss stays connected, its gradients are exact zeros
        assert all(not out[grad].any() for grad in GRADS)


def test_needs_input_grad(backend):
    """A frozen tensor gets no gradient and the values keep their bits."""
    name, device = backend
    batch = {n: t.to(device) for n, t in make_batch([9, 4], 20, 3).items()}
    values = []
    for needs in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        leaves = {n: batch[n].clone() for n in ("hidden", "head_weight", "head_bias")}
        for leaf, need in zip(leaves.values(), needs, strict=True):
            leaf.requires_grad_(bool(need))
        out = degree_loss(**{**batch, **leaves}, backend=name)
        assert out.losses.requires_grad == any(needs)
        assert out.correct_views.dtype == out.counted_views.dtype == torch.int32
        if any(needs):
            out.losses.sum().backward()
        assert [int(leaf.grad is not None) for leaf in leaves.values()] == list(needs)
        values.append(out.losses.detach())
    assert all(torch.equal(values[0], value) for value in values[1:])
    # a head in fp32 on half hidden states, as under mixed precision, with and without autocast
    batch["hidden"] = batch["hidden"].bfloat16().requires_grad_()
    batch["head_weight"] = batch["head_weight"].clone().requires_grad_()
    plain = degree_loss(**batch, backend=name).losses
    with torch.autocast(device, dtype=torch.bfloat16):
        losses = degree_loss(**batch, backend=name).losses
    assert torch.equal(plain, losses) and losses.dtype == torch.float32
    losses.sum().backward()
    assert batch["hidden"].grad.dtype == torch.bfloat16
    assert batch["head_weight"].grad.dtype == torch.float32


def test_edges(backend, poisoned_empty):
    """No rows, no segments, NaN where no response is, bad levels, large values."""
    name, device = backend
    for lengths in ([], [0], [0, 0, 0]):
        compare(backend, make_batch(lengths, 5, 3))
    batch = make_batch([6, 8, 5], 10, 3, before=2, after=2)
    levels = batch["removal_levels"]
    clean = compare(backend, batch)
    # prompts and padding may hold anything
    batch["hidden"][levels == -1] = math.nan
    batch["hidden"][:2] = math.inf
    batch["hidden"][-2:] = math.nan
    masked = run(
        degree_loss, {n: t.to(device) for n, t in batch.items()}, torch.ones(3), backend=name
    )
    assert torch.equal(masked["losses"], clean["losses"])
    assert masked["grad_hidden"].isfinite().all() and masked["grad_head_weight"].isfinite().all()
    # a NaN stays in its segment, and so does a level the head has no class for
    batch["hidden"][9, 0] = math.nan
    levels[9] = 0
    for bad_level in (0, 3, 100, -2):
        levels[9] = bad_level
        out = degree_loss(**{n: t.to(device) for n, t in batch.items()}, backend=name)
        assert out.losses.isnan().tolist() == [False, True, False]

    large = make_batch([12], 10, 3, dtype=torch.float16, seed=4)
    large["hidden"] = large["hidden"] * 2e4
    assert compare(backend, large)["losses"].isfinite().all()


def test_noncontiguous(backend):
    """Views give the bits of their copies; linear in any upstream, also one of stride 0."""
    name, device = backend
    batch = {n: t.to(device) for n, t in make_batch([11, 0, 30], 24, 4).items()}
    N, H = batch["hidden"].shape
    wide = torch.zeros(2 * N, H + 3, device=device)
    wide[::2, 3:] = batch["hidden"]
    row = batch["hidden"][:1]
    pairs = [
        (wide[::2, 3:], batch["hidden"]),
        (batch["hidden"].T.contiguous().T, batch["hidden"]),
        (row.expand(N, H), row.repeat(N, 1)),
    ]
    fields = ("hidden", "head_weight", "head_bias")

    def grads_of(hidden, upstream):
        leaves = {n: batch[n].detach().requires_grad_() for n in fields}
        leaves["hidden"] = hidden.detach().requires_grad_()
        losses = degree_loss(**{**batch, **leaves}, backend=name).losses
        return [losses, *torch.autograd.grad(losses, list(leaves.values()), upstream)]

    upstream = torch.tensor([1.0, -2.0, 0.5], device=device)
    for view, copy in pairs:
        results = zip(grads_of(view, upstream), grads_of(copy, upstream), strict=True)
        assert all(torch.equal(a, b) for a, b in results)
    batch["head_weight"] = batch["head_weight"].T.contiguous().T
    base = grads_of(batch["hidden"], upstream)
    strided = upstream.new_zeros(6)[::2].copy_(upstream)
    scaled = zip(base[1:], grads_of(batch["hidden"], strided * 4)[1:], strict=True)
    assert all(torch.equal(4 * a, b) for a, b in scaled)
    assert not any(g.any() for g in grads_of(batch["hidden"], upstream * 0)[1:])
    third = torch.tensor(1 / 3, device=device)
    expanded = grads_of(batch["hidden"], third.expand(3))
    repeated = grads_of(batch["hidden"], third.repeat(3))
    assert all(torch.equal(a, b) for a, b in zip(expanded, repeated, strict=True))


def test_autograd_contract(backend, poisoned_empty):
    """Two backwards agree, a double one is refused, checkpoints and runs give the same bits."""
    name, device = backend
    batch = {n: t.to(device) for n, t in make_batch([40, 3, 21], 30, 4).items()}
    leaves = [batch[n].requires_grad_() for n in ("hidden", "head_weight", "head_bias")]

    def losses(hidden, weight, bias):
        plan = batch["removal_levels"], batch["segment_offsets"]
        return degree_loss(hidden, *plan, weight, bias, backend=name).losses

    first = losses(*leaves)
    upstream = torch.ones_like(first)
    grads = torch.autograd.grad(first, leaves, upstream, retain_graph=True)
    kept = [grad.clone() for grad in grads]
    twice = torch.autograd.grad(first, leaves, upstream * 2, retain_graph=True)
    for grad, before, double in zip(grads, kept, twice, strict=True):
        assert torch.equal(grad, before) and torch.equal(double, 2 * before)
    for _ in range(2):
        again = losses(*leaves)
        again_grads = torch.autograd.grad(again, leaves, upstream)
        assert torch.equal(again, first)
        assert all(torch.equal(a, b) for a, b in zip(again_grads, kept, strict=True))
    for use_reentrant in (False, True):
        for leaf in leaves:
            leaf.grad = None
        checkpoint(losses, *leaves, use_reentrant=use_reentrant).sum().backward()
        assert all(torch.equal(a.grad, b) for a, b in zip(leaves, kept, strict=True))

    with pytest.raises(RuntimeError, match="once_differentiable: double backward"):
        torch.autograd.grad(losses(*leaves).square().sum(), leaves[1], create_graph=True)


def test_large_offset(backend):
    """A row further than 2**31 elements from the first is read where it lies."""
    name, device = backend
    # never written as a whole, so a CPU backs only the pages of the three rows
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    hidden = storage.as_strided((3, 16), (2**30, 1))
    hidden.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    batch = {n: t.to(device) for n, t in make_batch([3], 16, 3, dtype=torch.float16).items()}
    batch["removal_levels"] = torch.tensor([0, 1, 2], dtype=torch.int8, device=device)
    far = degree_loss(**{**batch, "hidden": hidden}, backend=name)
    near = degree_loss(**{**batch, "hidden": hidden.clone()}, backend=name)
    assert torch.equal(far.losses, near.losses) and far.counted_views.item() == 3


def test_compile():
    """The torch backend is one graph under torch.compile, with eager's gradients."""
    batch = make_batch([9, 4], 12, 3)
    leaves = [batch[n].requires_grad_() for n in ("hidden", "head_weight", "head_bias")]

    def losses(hidden, weight, bias):
        plan = batch["removal_levels"], batch["segment_offsets"]
        return degree_loss(hidden, *plan, weight, bias).losses

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    eager_grads = torch.autograd.grad(losses(*leaves).sum(), leaves)
    grads = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    assert all(torch.allclose(a, b) for a, b in zip(grads, eager_grads, strict=True))


GOOD = make_batch([3, 2], 8, 4)

REFUSALS = [
    refusal(
        ValueError, "hidden must have shape [N, H], got (1, 5, 8)", hidden=GOOD["hidden"][None]
    ),
    refusal(
        ValueError,
        "removal_levels must have shape [N] with N=5, got (4,)",
        removal_levels=GOOD["removal_levels"][:4],
    ),
    refusal(
        TypeError,
        "removal_levels must have dtype int8, got int64",
        removal_levels=GOOD["removal_levels"].long(),
    ),
    refusal(
        ValueError,
        "segment_offsets must have shape [S + 1], got (0,)",
        segment_offsets=GOOD["segment_offsets"][:0],
    ),
    refusal(
        ValueError,
        "head_weight must have shape [K, H] with H=8, got (4, 7)",
        head_weight=GOOD["head_weight"][:, :7],
    ),
    refusal(
        ValueError,
        "head_weight must have 2 to 16 rows (degrees K), got 1",
        head_weight=GOOD["head_weight"][:1],
    ),
    refusal(
        RuntimeError,
        "head_weight must hold [K, H] elements with H=8, got 0 elements (0,). "
        "A sharded head must be gathered first (ZeRO-3: GatheredParameters).",
        head_weight=GOOD["head_weight"].new_empty(0),
    ),
    refusal(
        ValueError,
        "head_bias must have shape [K] with K=4, got (3,)",
        head_bias=GOOD["head_bias"][:3],
    ),
    refusal(
        ValueError,
        "removal_levels must be on {device} like hidden, got meta",
        removal_levels=GOOD["removal_levels"].to("meta"),
    ),
    refusal(TypeError, "center_views must be a bool, got int", center_views=1),
]


@pytest.mark.parametrize(REFUSAL, REFUSALS)
def test_errors(backend, error, text, args, settings):
    """Shapes, dtypes, devices, settings: one sentence for each mistake."""
    assert_refused(degree_loss, backend, error, text, args, GOOD | settings)


def test_no_fp64_on_triton(backend):
    assert_no_fp64_on_triton(degree_loss, backend, GOOD, "hidden")
