"""``bradley_terry_loss``: both backends against the fp64 oracle, TRL's own loss, edges."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from spo_kernels import bradley_terry_loss
from spo_kernels.reference.bradley_terry_loss import bradley_terry_loss_reference
from tests.helpers.oracle import assert_within_budget
from tests.helpers.refusals import REFUSAL, assert_no_fp64_on_triton, assert_refused, refusal

BLOCK_P = 128
CENTERS = [None, 0.01, 2.0]
pair_counts = st.one_of(
    st.sampled_from([1, BLOCK_P - 1, BLOCK_P, BLOCK_P + 1, 2 * BLOCK_P + 3]), st.integers(0, 40)
)


def make_rewards(P, *, dtype=torch.float32, seed=0, scale=4.0):
    """Random rewards of P pairs with their margins; some pairs are ties."""
    generator = torch.Generator().manual_seed(seed)
    rewards = scale * torch.randn(2, P, generator=generator)
    rewards[1, ::5] = rewards[0, ::5]
    margins = 3.0 * torch.rand(P, generator=generator)
    return {
        "chosen_rewards": rewards[0].to(dtype),
        "rejected_rewards": rewards[1].to(dtype),
        "margins": margins.to(dtype),
    }


def run(call, tensors, upstream, **settings):
    """Return the outputs and the rewards' gradients under ``upstream``, by name."""
    leaves = {n: t.clone().requires_grad_(n != "margins") for n, t in tensors.items()}
    out = call(**leaves, **settings)
    out = out if isinstance(out, dict) else out._asdict()
    out["losses"].backward(upstream.to(out["losses"].device, out["losses"].dtype))
    return {**out, **{f"grad_{n}": t.grad for n, t in leaves.items() if n != "margins"}}


def compare(backend, tensors, upstream, **settings):
    """Hold every output and gradient to the budget of fp32 arithmetic on the same inputs."""
    name, device = backend
    call = bradley_terry_loss_reference
    doubled = {n: t.double() for n, t in tensors.items()}
    oracle = run(call, doubled, upstream.double(), **settings)
    eager = run(call, {n: t.float() for n, t in tensors.items()}, upstream, **settings)
    moved = {n: t.to(device) for n, t in tensors.items()}
    actual = run(bradley_terry_loss, moved, upstream, **settings, backend=name)
    assert torch.equal(actual.pop("is_correct").cpu(), oracle.pop("is_correct"))
    for field, value in actual.items():
        label = f"bradley_terry_loss[{name}].{field} {settings}"
        assert_within_budget(label, value.cpu(), eager[field], oracle[field])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("center", CENTERS)
@settings(max_examples=6)
# an empty batch never launches, and gives gradients of shape (0,)
@example(P=0, scale=1.0, seed=0)
@given(P=pair_counts, scale=st.sampled_from([0.1, 4.0, 60.0]), seed=st.integers(0, 99))
def test_forward_and_gradients(backend, dtype, center, P, scale, seed):
    """With and without margins, under a random upstream; a column of rewards is the same."""
    tensors = make_rewards(P, dtype=dtype, seed=seed, scale=scale)
    upstream = torch.randn(P, generator=torch.Generator().manual_seed(seed))
    compare(backend, tensors, upstream, center_rewards_coefficient=center)
    margins = tensors.pop("margins")
    compare(backend, tensors, upstream, center_rewards_coefficient=center)

    name, device = backend
    flat = {n: t.to(device) for n, t in tensors.items()}
    column = {n: t[:, None] for n, t in flat.items()}
    setting = {"margins": margins.to(device), "backend": name}
    flat = run(bradley_terry_loss, flat, upstream, **setting)
    for field, value in run(bradley_terry_loss, column, upstream, **setting).items():
        assert value.shape == ((P, 1) if field.startswith("grad") else (P,))
        assert torch.equal(value.view(P), flat[field])


def test_reference():
    """The oracle has the values computed by hand, and its gradients are those of its values."""
    c, r, margin = (torch.tensor([value], dtype=torch.float64) for value in (1.5, -0.5, 0.25))
    base = math.log1p(math.exp(-2.0))
    by_hand = {
        (None, None): base,
        (margin, None): math.log1p(math.exp(-1.75)),
        # (1.5 - 0.5)^2 = 1
        (None, 0.01): base + 0.01,
    }
    for (margins, center), value in by_hand.items():
        for call in (bradley_terry_loss_reference, bradley_terry_loss):
            out = call(c, r, margins, center_rewards_coefficient=center)
            losses = (out if isinstance(out, dict) else out._asdict())["losses"]
            assert losses.item() == pytest.approx(value, rel=1e-12)

    leaves = list(make_rewards(7, dtype=torch.float64).values())
    leaves = [leaves[0].requires_grad_(), leaves[1].requires_grad_(), leaves[2]]
    for center in CENTERS:

        def losses(*args, center=center):
            return bradley_terry_loss(*args, center_rewards_coefficient=center).losses

        assert torch.autograd.gradcheck(losses, leaves)


def test_needs_input_grad(backend):
    """A frozen side gets no gradient and the values keep their bits."""
    name, device = backend
    values = []
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        leaves = [t.to(device).clone() for t in make_rewards(9).values()]
        for leaf, need in zip(leaves, needs, strict=False):
            leaf.requires_grad_(need)
        out = bradley_terry_loss(*leaves, backend=name)
        assert not out.is_correct.requires_grad and out.losses.requires_grad == any(needs)
        if any(needs):
            out.losses.sum().backward()
        assert tuple(leaf.grad is not None for leaf in leaves) == (*needs, False)
        values.append(out.losses.detach())
    assert all(torch.equal(values[0], value) for value in values[1:])


def test_edges(backend, poisoned_empty):
    """Empty, NaN in its row only, large rewards, fp16 extremes, ties."""
    name, device = backend

    def losses(chosen, rejected, dtype=torch.float32, **kwargs):
        leaves = [
            torch.tensor(t, dtype=dtype, device=device).requires_grad_() for t in (chosen, rejected)
        ]
        out = bradley_terry_loss(*leaves, backend=name, **kwargs)
        out.losses.sum().backward()
        return out, leaves[0].grad, leaves[1].grad

    for center in CENTERS:
        setting = {"center_rewards_coefficient": center}
        out, *grads = losses([], [], **setting)
        assert out.losses.shape == out.is_correct.shape == grads[0].shape == (0,)
        out, *grads = losses([5.0, math.nan, 6.0], [9.0, -1.0, -2.0], **setting)
        assert out.losses.isnan().tolist() == [False, True, False]
        assert out.is_correct.tolist() == [False, False, True]
        assert all(grad.isnan().tolist() == [False, True, False] for grad in grads)
        for extreme in (1e4, -1e4):
            out, *grads = losses([extreme, 0.0], [-extreme, extreme], **setting)
            assert all(t.isfinite().all() for t in (out.losses, *grads))
        # the difference, and the square, of two fp16 rewards leave fp16's range
        out, *grads = losses([65504.0, -65504.0], [-65504.0, 65504.0], torch.float16, **setting)
        assert all(t.isfinite().all() for t in (out.losses, *grads))
        assert out.losses.tolist() == [0.0, 131008.0]
        assert out.is_correct.tolist() == [True, False]
    # without centring an infinite reward has its limit, and no 0 * inf
    out, *grads = losses([math.inf], [0.0], center_rewards_coefficient=0.0)
    assert out.losses.item() == grads[0].item() == grads[1].item() == 0.0

    # equal rewards cost log 2, whatever they are, and are not correct
    same = torch.randn(50, generator=torch.Generator().manual_seed(1)).mul(300).tolist()
    out, grad, _ = losses(same, same)
    assert out.losses.unique().numel() == 1 and not out.is_correct.any()
    assert out.losses[0].item() == pytest.approx(math.log(2.0), abs=1e-7)
    assert torch.equal(grad, torch.full_like(grad, -0.5))
    # the margin is not part of who is right
    out, _, _ = losses([1.0], [0.0], margins=torch.tensor([2.0], device=device))
    assert out.is_correct.item() and out.losses.item() == pytest.approx(math.log1p(math.e))


def test_noncontiguous(backend):
    """Views give the bits of their copies; linear in any upstream, also one of stride 0."""
    name, device = backend
    base = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)).to(device) * 9
    views = [base[0, ::2], base[1:3].T[:20, 0], base[2, 5].expand(20)]
    # the two halves of a head's output, as a trainer passes them
    columns = [t[:, None] for t in base[3].view(2, 20)]

    def grads_of(tensors, upstream):
        leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(tensors)]
        loss = bradley_terry_loss(*leaves, center_rewards_coefficient=0.1, backend=name).losses
        return loss, torch.stack(torch.autograd.grad(loss, leaves[:2], upstream))

    upstream = torch.randn(20, generator=torch.Generator().manual_seed(4)).to(device)
    for tensors in (views, [*columns, views[2]], [t.expand(20, 1) for t in base[:2, :1, None]]):
        loss, grads = grads_of(tensors, upstream)
        copy_loss, copy_grads = grads_of([t.contiguous() for t in tensors], upstream)
        assert torch.equal(loss, copy_loss) and torch.equal(grads, copy_grads)
    grads = grads_of(views, upstream)[1]
    strided = upstream.new_zeros(40)[::2].copy_(upstream)
    assert torch.equal(grads_of(views, strided)[1], grads)
    assert torch.equal(grads_of(views, upstream * 4)[1], grads * 4)
    assert not grads_of(views, upstream * 0)[1].any()
    # y.mean().backward() sends an expanded scalar
    mean = grads_of(views, torch.tensor(1 / 20, device=device).expand(20))[1]
    assert torch.equal(mean, grads_of(views, torch.full((20,), 1 / 20, device=device))[1])


def test_autograd_contract(backend, poisoned_empty):
    """Two backwards agree, a double one is refused, checkpoints and runs give the same bits."""
    name, device = backend
    tensors = make_rewards(BLOCK_P + 5)
    leaves = [t.to(device).requires_grad_(n != "margins") for n, t in tensors.items()]

    def losses(*args):
        return bradley_terry_loss(*args, center_rewards_coefficient=0.1, backend=name).losses

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

    text = "bradley_terry_loss: once_differentiable: double backward unsupported. Call backward "
    with pytest.raises(RuntimeError, match=text + "without create_graph=True."):
        torch.autograd.grad(losses(*leaves).square().sum(), leaves[0], create_graph=True)


def test_compile():
    """The torch backend is one graph under torch.compile, with eager's gradients."""
    leaves = [t.requires_grad_(n != "margins") for n, t in make_rewards(7).items()]

    def losses(*args):
        out = bradley_terry_loss(*args, center_rewards_coefficient=0.01)
        return out.losses, out.is_correct

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    (expected, expected_correct), (actual, correct) = losses(*leaves), compiled(*leaves)
    assert torch.equal(correct, expected_correct)
    expected_grads = torch.autograd.grad(expected.sum(), leaves[:2])
    grads = torch.autograd.grad(actual.sum(), leaves[:2])
    assert all(torch.allclose(a, b) for a, b in zip(grads, expected_grads, strict=True))


TWO, THREE = torch.zeros(2), torch.zeros(3)

REFUSALS = [
    refusal(
        ValueError,
        "rejected_rewards must have shape [P] with P=2 like chosen_rewards, got (1,)",
        *THREE.chunk(2),
    ),
    refusal(
        ValueError,
        "rejected_rewards must have shape [P, 1] with P=2 like chosen_rewards, got (2,)",
        TWO[:, None],
        TWO,
    ),
    refusal(
        ValueError,
        "margins must have shape [P] with P=2, got (2, 1)",
        TWO[:, None],
        TWO[:, None],
        TWO[:, None],
    ),
    refusal(TypeError, "rejected_rewards must be a tensor, got list", TWO, [0.0, 0.0]),
    refusal(TypeError, "margins must be a tensor, got float", TWO, TWO, 1.0),
    refusal(
        TypeError,
        "rejected_rewards must have dtype float32 like chosen_rewards, got float16",
        TWO,
        TWO.half(),
    ),
    refusal(
        TypeError,
        "margins must have dtype bfloat16, float16, float32, float64, got int64",
        TWO,
        TWO,
        TWO.long(),
    ),
    refusal(
        ValueError,
        "margins must be on {device} like chosen_rewards, got meta",
        TWO,
        TWO,
        TWO.to("meta"),
    ),
    *(
        refusal(
            ValueError,
            f"chosen_rewards must have shape [P] or [P, 1], got {shape}",
            torch.zeros(shape),
            torch.zeros(shape),
        )
        for shape in ((1, 2), (2, 1, 1), ())
    ),
    *(
        refusal(
            error,
            f"center_rewards_coefficient must be a {text}, got {got}",
            TWO,
            TWO,
            center_rewards_coefficient=value,
        )
        for error, text, got, value in (
            (ValueError, "finite float >= 0", -0.1, -0.1),
            (ValueError, "finite float >= 0", "nan", math.nan),
            (ValueError, "finite float >= 0", "inf", math.inf),
            (TypeError, "Python float", "Tensor", TWO[0]),
            (TypeError, "Python float", "str", "0.1"),
        )
    ),
    refusal(
        ValueError,
        "backend must be one of 'auto', 'torch', 'triton', got 'cuda'",
        TWO,
        TWO,
        backend="cuda",
    ),
]


@pytest.mark.parametrize(REFUSAL, REFUSALS)
def test_errors(backend, error, text, args, settings):
    """Shapes, dtypes, devices, settings: one sentence for each mistake."""
    assert_refused(bradley_terry_loss, backend, error, text, args, settings)


@pytest.mark.parametrize("fields", [("chosen_rewards", "rejected_rewards"), ("margins",)], ids=str)
def test_no_fp64_on_triton(backend, fields):
    assert_no_fp64_on_triton(bradley_terry_loss, backend, make_rewards(2), *fields)


@pytest.fixture(scope="module")
def reward_trainer(tmp_path_factory):
    """TRL's RewardTrainer of a tiny model, which evaluates what it is given."""
    trl = pytest.importorskip("trl")
    from transformers import LlamaForSequenceClassification

    from tests.helpers.trl_tiny import Tiny, arguments, tiny_config

    folder = tmp_path_factory.mktemp("reward")
    tiny = Tiny(folder)
    model = LlamaForSequenceClassification(tiny_config(tiny.tokenizer, num_labels=1))
    trainer = trl.RewardTrainer(
        model=model,
        args=arguments(folder, trl.RewardConfig),
        train_dataset=tiny.dataset,
        processing_class=tiny.tokenizer,
    )
    trainer.model.eval()
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("has_margins", [False, True])
def test_agrees_with_trl(backend, dtype, center, has_margins, reward_trainer):
    """The batch loss, its gradient and the accuracy are those of TRL's own RewardTrainer."""
    name, device = backend
    reward_trainer.args.center_rewards_coefficient = center
    tensors = make_rewards(9, dtype=dtype)
    # the collator makes margins fp32 whatever the model's dtype
    margins = tensors.pop("margins").float()
    margins = margins if has_margins else None
    logits = torch.cat(list(tensors.values()))[:, None]

    def theirs(dtype):
        """Return TRL's loss, the gradient of the logits and the accuracy."""
        leaf = logits.to(dtype, copy=True).requires_grad_()
        inputs = {} if margins is None else {"margin": margins.to(dtype)}
        loss = reward_trainer.compute_loss(lambda **_: SimpleNamespace(logits=leaf), inputs)
        loss.backward()
        reward_trainer.log(logs := {})
        return loss.detach(), leaf.grad, logs["eval_accuracy"]

    oracle_loss, oracle_grad, accuracy = theirs(torch.float64)
    trl_loss, trl_grad, _ = theirs(dtype)
    leaf = logits.to(device, copy=True).requires_grad_()
    out = bradley_terry_loss(
        *leaf.chunk(2),
        None if margins is None else margins.to(device),
        center_rewards_coefficient=center,
        backend=name,
    )
    loss = out.losses.mean()
    loss.backward()
    label = f"bradley_terry_loss[{name}] beside TRL"
    assert_within_budget(label, loss.cpu(), trl_loss.float(), oracle_loss)
    assert_within_budget(label, leaf.grad.cpu(), trl_grad, oracle_grad)
    assert out.is_correct.float().mean().item() == pytest.approx(accuracy)
    if dtype == torch.bfloat16:
        assert (loss.cpu() - oracle_loss).abs() <= (trl_loss - oracle_loss).abs()
        ours, trl = ((grad.cpu() - oracle_grad).abs().max() for grad in (leaf.grad, trl_grad))
        assert ours <= trl
