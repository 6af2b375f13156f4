"""``linear_preference_loss`` at its edges, its errors, and Liger beside it."""

import math

import pytest
import torch

from spo_kernels import linear_logprob, linear_preference_loss, unpaired_preference_loss
from tests.helpers.linear_pair_cases import (
    SPANS,
    WHOLE,
    H,
    V,
    compare,
    groups_of,
    make_batch,
    op,
    run,
)

GROUPS = pytest.mark.parametrize("group_rows", [WHOLE, SPANS], ids=["group", "stream"])


@pytest.mark.parametrize("strategy", ["pairwise", "recompute", "auto"])
@pytest.mark.parametrize("P", [0, 3], ids=["empty", "all_ignored"])
@pytest.mark.parametrize("mix", [{}, {"ld_alpha": 0.5}, {"loss_type": ("sigmoid", "nll")}], ids=str)
def test_nothing_scored(backend, P, strategy, mix):
    """No pair: loss 0; no token: that of margin 0. Connected to every input, gradients 0."""
    name, device = backend
    head, pairs = make_batch(("sigmoid",), P, lora=True)
    pairs = {"labels": torch.full_like(pairs["labels"], -100)}
    if "loss_type" in mix:
        pairs["response_labels"] = pairs["labels"][:P]
    out = run(op, head, pairs, device=device, strategy=strategy, backend=name, **mix)
    assert out["loss"].item() == pytest.approx(math.log(2) if P else 0.0)
    assert out["losses"].shape == (P,)
    for key, value in out.items():
        if key.startswith("grad"):
            assert value.shape == head[key.removeprefix("grad_")].shape and not value.any()


@GROUPS
def test_empty_response(backend, group_rows):
    """Completions without a token, of either side and of both, by sums and by means."""
    head, pairs = make_batch(("sigmoid",), 5, seed=2)
    for row in (1, 7, 3, 8):
        pairs["labels"][row] = -100
    # an empty reference is a sum of nothing
    pairs["ref_logps"][[1, 7, 3, 8]] = 0.0
    for names in (("sigmoid",), ("ipo", "sft"), ("orpo",), ("simpo",)):
        compare(backend, head, pairs, strategy="pairwise", group_rows=group_rows, loss_type=names)


def test_policy_equal_to_reference(backend):
    """A margin of 0 whatever the groups, since a row's log-prob never changes."""
    name, device = backend
    head, pairs = make_batch(("sigmoid",), 4, seed=9)
    labels = pairs["labels"].to(device)
    tensors = {key: tensor.to(device) for key, tensor in head.items()}
    ref = linear_logprob(**tensors, labels=labels, backend=name).logps
    for ref_logps in (ref, ref.double().sum(1)):
        for rows in (1000, SPANS):
            pairs = {"labels": labels, "ref_logps": ref_logps.float()}
            with groups_of(rows):
                out = run(op, head, pairs, device=device, strategy="pairwise", backend=name)
            rewards = torch.stack([out["chosen_rewards"], out["rejected_rewards"]])
            if ref_logps.dim() == 2 and backend != ("triton", "cpu"):
                assert not rewards.any()
            # sums are rounded, and numpy's product rounds a tile's last rows in another order
            assert rewards.abs().max() < 1e-6
            torch.testing.assert_close(out["losses"], torch.full_like(out["losses"], math.log(2)))


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("hidden", "lora_b"), ()])
def test_needs_input_grad(backend, needs):
    """Only what is asked for gets a gradient; a frozen head is never ``pairwise``."""
    name, device = backend
    head, pairs = make_batch(("sigmoid",), 3, lora=True)
    if not needs:
        leaves = {key: tensor.to(device) for key, tensor in head.items()}
        with torch.no_grad():
            out = op(leaves, {k: t.to(device) for k, t in pairs.items()}, backend=name)
        assert not out["loss"].requires_grad
        return
    strategy = "auto" if needs == ("hidden",) else "pairwise"
    compare(backend, head, pairs, strategy=strategy, needs=needs)
    if strategy == "auto":
        with pytest.raises(NotImplementedError, match="cannot run this call: the head needs no"):
            run(op, head, pairs, needs=needs, device=device, backend=name, strategy="pairwise")


@GROUPS
def test_upstream_gradients(backend, group_rows):
    """Linear in the upstream; a second backward is equal; a double one is refused."""
    name, device = backend
    head, pairs = make_batch(("sigmoid",), 3, seed=4)
    settings = {"strategy": "pairwise", "backend": name}
    leaves = {key: tensor.to(device).requires_grad_() for key, tensor in head.items()}
    pairs = {key: tensor.to(device) for key, tensor in pairs.items()}
    with groups_of(group_rows or 1000):
        loss = op(leaves, pairs, **settings)["loss"]
    inputs = list(leaves.values())
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs, retain_graph=True)
    tripled = torch.autograd.grad(4.0 * loss, inputs, retain_graph=True)
    for first, second, third in zip(once, again, tripled, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(4.0 * first, third)
    assert not any(g.any() for g in torch.autograd.grad(0.0 * loss, inputs, retain_graph=True))
    with pytest.raises(RuntimeError, match="linear_preference_loss: .*double backward"):
        torch.autograd.grad(loss, inputs, create_graph=True)


@GROUPS
def test_noncontiguous(backend, group_rows):
    """Strided inputs give the bits of contiguous ones."""
    name, device = backend
    head, pairs = make_batch(("sigmoid",), 3, seed=7)
    settings = {"strategy": "pairwise", "backend": name, "device": device}
    with groups_of(group_rows or 1000):
        wanted = run(op, head, pairs, **settings)
    strided = {
        "hidden": torch.stack([head["hidden"]] * 2, 1)[:, 1],
        "weight": head["weight"].t().contiguous().t(),
        "bias": torch.stack([head["bias"]] * 2, 1)[:, 0],
    }
    pairs["ref_logps"] = torch.stack([pairs["ref_logps"]] * 2, 1)[:, 1]
    pairs["labels"] = pairs["labels"].t().contiguous().t()
    with groups_of(group_rows or 1000):
        found = run(op, strided, pairs, **settings)
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=1e-7, msg=key)


def test_autocast():
    """Under autocast an fp32 head is computed in bf16 and its gradient is fp32."""
    head, pairs = make_batch(("sigmoid",), 3, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(op, head, pairs, strategy="pairwise")
    rounded = {key: tensor.bfloat16() for key, tensor in head.items()}
    wanted = run(op, rounded, pairs, strategy="pairwise")
    assert out["grad_weight"].dtype == torch.float32
    torch.testing.assert_close(out["loss"], wanted["loss"], rtol=0, atol=0)
    for key in ("grad_hidden", "grad_weight"):
        # the same sums, rounded to bf16 at the end or not at all
        assert torch.equal(out[key].bfloat16(), wanted[key]), key


ERRORS = [
    (
        {"hidden": (3, 5, 8), "labels": (3, 5)},
        ValueError,
        r"hidden must hold .* even batch, got B=3",
    ),
    ({"hidden": (20, 8), "labels": (20,)}, ValueError, r"hidden must have shape \[B, T, H\]"),
    ({"loss_type": "selm"}, ValueError, "third rows for loss_type='selm', got B=4"),
    ({"ref_logps": (3,)}, ValueError, r"ref_logps must have shape \(4,\) or \(4, 5\), got \(3,\)"),
    ({"labels": (4, 6)}, ValueError, r"labels must have shape \(4, 5\), got \(4, 6\)"),
    ({"weight": (9, 7)}, ValueError, r"weight must have shape \[V, H\] with H=8"),
    ({"pair_weights": (3,)}, ValueError, r"pair_weights must have shape \[P\] with P=2"),
    ({"response_labels": (2, 4), "loss_type": "nll"}, ValueError, r"response_labels must have"),
    ({"response_labels": (2, 5)}, ValueError, "response_logps must be None"),
    ({"response_labels": (2, 5), "loss_type": "selm"}, ValueError, "be None for loss_type='selm'"),
    ({"strategy": "fast"}, ValueError, "strategy must be one of 'auto', .*'pairwise'"),
    ({"temperature": 0.0}, ValueError, "linear_preference_loss: temperature must"),
    ({"loss_type": "dpo"}, ValueError, "loss_type must be one of"),
    ({"budget_bytes": 10}, ValueError, "budget_bytes must be at least"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "match"), ERRORS, ids=lambda v: str(v)[:40])
def test_errors(change, error, match):
    """Odd batches, shapes, names: one sentence with argument, requirement and value."""
    shapes = {"hidden": (4, 5, 8), "weight": (9, 8), "labels": (4, 5)}
    arguments = {}
    for name, value in {**shapes, **change}.items():
        if isinstance(value, tuple):
            integer = "labels" in name
            value = torch.zeros(value, dtype=torch.int64 if integer else torch.float32)
        arguments[name] = value
    arguments["weight"].requires_grad_()
    with pytest.raises(error, match=match):
        linear_preference_loss(**arguments)


def test_label_outside():
    """A label outside the vocabulary is named before anything is computed."""
    labels = torch.tensor([[1, -100], [2, 9]])
    with pytest.raises(IndexError, match=r"linear_preference_loss: target 9 at row 3 outside"):
        linear_preference_loss(torch.zeros(2, 2, 8), torch.zeros(9, 8), labels)


def test_response_label_outside():
    """Every label is checked, where another one covers it or an int32 would wrap it too."""
    labels = torch.tensor([[1, 3], [2, 4]], dtype=torch.int32)
    for bad in (9999, 2**32 + 3):
        with pytest.raises(IndexError, match=f"target {bad} at row 4 outside"):
            linear_preference_loss(
                torch.zeros(2, 2, 8),
                torch.zeros(9, 8),
                labels,
                loss_type="nll",
                response_labels=torch.tensor([[bad, 3]]),
            )


LIGER = [
    ("LigerFusedLinearDPOLoss", {"loss_type": "sigmoid"}, {"loss_type": "sigmoid"}, "sums"),
    ("LigerFusedLinearDPOLoss", {"loss_type": "apo_zero"}, {"loss_type": "apo_zero"}, "sums"),
    (
        "LigerFusedLinearCPOLoss",
        {"alpha": 0.7, "label_smoothing": 0.1},
        {"loss_type": ["cpo", "sft"], "loss_weights": [1.0, 0.7], "label_smoothing": 0.1},
        "none",
    ),
    (
        "LigerFusedLinearSimPOLoss",
        {"alpha": 0.4, "gamma": 0.6, "compute_nll_loss": True},
        {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.4], "simpo_gamma": 0.6},
        "none",
    ),
    ("LigerFusedLinearORPOLoss", {}, {"loss_type": ["orpo", "sft"]}, "none"),
    ("LigerFusedLinearORPOLoss", {}, {"loss_type": ["orpo", "nll"]}, "nll_target"),
]


@pytest.mark.parametrize("strategy", ["pairwise", "recompute"])
@pytest.mark.parametrize(("name", "theirs", "ours", "reference_model"), LIGER, ids=str)
def test_agrees_with_liger(name, theirs, ours, reference_model, strategy):
    """The README's migration table: Liger's loss and gradients on the same tensors."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    head, pairs = make_batch(("sigmoid",), 3, seed=11)
    leaves = {key: head[key].clone().requires_grad_() for key in ("hidden", "weight")}
    labels = pairs["labels"]
    generator = torch.Generator().manual_seed(1)
    given, ref_logps = (), None
    if reference_model == "sums":
        ref_hidden = torch.randn(head["hidden"].shape, generator=generator)
        ref_weight = torch.randn(V, H, generator=generator) * H**-0.5
        given = (None, ref_hidden, ref_weight)
        ref_logps = linear_logprob(ref_hidden, ref_weight, labels).logps
    if reference_model == "nll_target":
        # the prompt counts too
        prompt = torch.randint(0, V, labels.shape, generator=generator)
        nll_target = torch.where(labels == -100, prompt, labels)
        given = (None, nll_target)
    beta = 2.0 if "SimPO" in name else 0.3
    loss_function = getattr(chunked_loss, name)(beta=beta, compiled=False, **theirs)
    expected, *_ = loss_function(leaves["weight"], leaves["hidden"], labels, *given)
    expected.backward()
    pairs = {"labels": labels} | ({} if ref_logps is None else {"ref_logps": ref_logps})
    if reference_model == "nll_target":
        pairs["response_labels"] = nll_target[:3]
    head = {key: head[key] for key in leaves}
    found = run(op, head, pairs, upstream=1.0, beta=beta, strategy=strategy, **ours)
    torch.testing.assert_close(found["loss"], expected.detach(), rtol=2e-5, atol=2e-6)
    for key, leaf in leaves.items():
        torch.testing.assert_close(found[f"grad_{key}"], leaf.grad, rtol=1e-4, atol=1e-6)


def test_agrees_with_liger_kto():
    """The migration table's row of KTO: log-probs of every row, then the unpaired loss."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    head, pairs = make_batch(("sigmoid",), 3, seed=12)
    labels = pairs["labels"]
    leaves = {key: head[key].clone().requires_grad_() for key in ("hidden", "weight")}
    generator = torch.Generator().manual_seed(2)
    ref_hidden = torch.randn(head["hidden"].shape, generator=generator)
    ref_weight = torch.randn(V, H, generator=generator) * H**-0.5
    is_desirable = torch.tensor([True, False, False, True, True, False])
    kl = torch.tensor(0.3)
    expected, *_ = chunked_loss.LigerFusedLinearKTOLoss(
        beta=0.2, compiled=False, use_ref_model=True
    )(
        leaves["hidden"],
        leaves["weight"],
        labels,
        preference_labels=is_desirable,
        ref_input=ref_hidden,
        ref_weight=ref_weight,
        kl=kl,
    )
    expected.backward()
    own = {key: head[key].clone().requires_grad_() for key in leaves}
    logps = linear_logprob(**own, labels=labels).logps
    ref_logps = linear_logprob(ref_hidden, ref_weight, labels).logps
    out = unpaired_preference_loss(logps, ref_logps, is_desirable=is_desirable, kl=kl, beta=0.2)
    out.losses.mean().backward()
    torch.testing.assert_close(out.losses.mean(), expected, rtol=2e-5, atol=2e-6)
    for key, leaf in leaves.items():
        torch.testing.assert_close(own[key].grad, leaf.grad, rtol=1e-4, atol=1e-6)
