"""``linear_logprob`` at its edges: the faults of tests/README.md, on both backends."""

import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from spo_kernels import linear_logprob
from tests.helpers.budgets import smallest_budget
from tests.helpers.logprob_cases import (
    ALL_OUTPUTS,
    DIFFERENTIABLE,
    STRATEGIES,
    TRANSFORMS,
    compare,
    make_case,
    relative_norm,
)

INF = float("inf")


@pytest.mark.parametrize(("strategy", "needs"), STRATEGIES[1:], ids=lambda v: str(v)[:24])
@pytest.mark.parametrize("rows", [0, 5], ids=["empty", "all_ignored"])
def test_nothing_scored(backend, rows, strategy, needs):
    """No row, or every label ignored: zeros connected to every input, gradients exactly 0."""
    name, device = backend
    case = make_case(rows=rows, H=8, V=40, device=device, bias=True, lora=True, ignored=1.1)
    out, grads = case.evaluate("op", needs, outputs=ALL_OUTPUTS, strategy=strategy, backend=name)
    assert out["logps"].shape == (rows,)
    for key in ALL_OUTPUTS:
        assert not out[key].any()
    for key in needs:
        assert grads[key].shape == case.tensors[key].shape and not grads[key].any()


def test_bad_labels(backend):
    """A label outside [0, V) raises and is named with its row, also where rows are given."""
    name, device = backend
    hidden, weight = torch.randn(5, 8, device=device), torch.randn(151, 8, device=device)
    for bad in (151, 1151, -1, 2**40):
        labels = torch.tensor([1, -100, 7, bad, 2], device=device)
        with pytest.raises(IndexError, match=rf"target {bad} at row 3 outside \[0, 151\)"):
            linear_logprob(hidden, weight, labels, backend=name)
        with pytest.raises(IndexError, match=f"target {bad} at row 3"):
            linear_logprob(hidden, weight, labels, scored_rows=4, validate=True, backend=name)


@pytest.mark.gpu
def test_bad_labels_without_sync(cuda_device):
    """With scored_rows nothing is read back from a GPU: the row of a bad label alone is NaN."""
    hidden = torch.randn(5, 64, device=cuda_device, dtype=torch.bfloat16)
    weight = torch.randn(151, 64, device=cuda_device, dtype=torch.bfloat16)
    for bad in (151, 1151, -1, 2**40):
        labels = torch.tensor([1, -100, 7, bad, 2], device=cuda_device)
        out = linear_logprob(hidden, weight, labels, scored_rows=4)
        assert out.logps.isnan().tolist() == [False, False, False, True, False]
    wrong = linear_logprob(hidden, weight, labels, scored_rows=3)
    assert wrong.logps.isnan().all()


@pytest.mark.parametrize("softcap", [None, 1.0, 30.0])
def test_padding_columns(backend, softcap):
    """Columns past V stay out, softcap or not, when every logit is strongly negative."""
    name, device = backend
    case = make_case(rows=20, H=16, V=77, device=device, bias=True, softcap=softcap)
    case.tensors["bias"] = case.tensors["bias"] - 35
    compare(case, ("hidden",), strategy="direction", backend=name)
    compare(case, ("hidden", "weight", "bias"), strategy="recompute", backend=name)


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_labels_in_few_columns(backend, dtype, softcap):
    """Most tiles hold no label: the form of a tile that skips it, with every output."""
    name, device = backend
    for strategy, needs, upstream in (
        ("direction", ("hidden",), ("logps",)),
        ("resident", ("hidden", "weight"), DIFFERENTIABLE),
        ("recompute", ("hidden", "weight"), DIFFERENTIABLE),
    ):
        extras = {"bias": True, "softcap": softcap, "upstream": upstream}
        case = make_case(rows=40, H=24, V=1200, dtype=dtype, device=device, **extras)
        case.labels.copy_(torch.where(case.labels >= 0, 300 + case.labels % 20, case.labels))
        compare(case, needs, strategy=strategy, backend=name, name=strategy)


@pytest.mark.parametrize("upstream", [("logps",), DIFFERENTIABLE], ids=["logps", "all"])
@pytest.mark.parametrize("options", TRANSFORMS, ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_labels_of_other_rows(backend, dtype, options, upstream):
    """A row's outputs and gradient have the same bits wherever the other rows' labels are."""
    name, device = backend
    extras = {"bias": True, "ignored": 0.0, "upstream": upstream, **options}
    case = make_case(rows=40, H=24, V=700, dtype=dtype, device=device, **extras)
    found = []
    for labels in (300 + case.labels % 20, torch.arange(40, device=device) * 17):
        case.labels[1:] = labels[1:]
        for strategy in ("direction", "resident", "recompute"):
            out, grads = case.evaluate(
                "op", ("hidden",), outputs=ALL_OUTPUTS, strategy=strategy, backend=name
            )
            found.append([*(value[0] for value in out.values()), grads["hidden"][0]])
    for first, second in zip(found[:3], found[3:], strict=True):
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("masked", ["first", "middle", "last", "all_but_target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_minus_infinity(backend, dtype, masked):
    """A -inf bias over any tile, the first included, is an exact softmax over the rest."""
    name, device = backend
    V, target = 600, 300
    case = make_case(rows=9, H=16, V=V, dtype=dtype, device=device, bias=True, ignored=0.0)
    case.labels[:] = target
    bias = case.tensors["bias"]
    cut = {"first": slice(0, 280), "middle": slice(310, 400), "last": slice(320, V)}
    if masked == "all_but_target":
        bias[:target] = -INF
        bias[target + 1 :] = -INF
    else:
        bias[cut[masked]] = -INF
    outputs = ("logps", "entropy", "logsumexp", "is_top1", "log_sum_sq_probs")
    for strategy, needs in (("direction", ("hidden",)), ("resident", ("hidden", "weight"))):
        out, grads = case.evaluate("op", needs, outputs=outputs, strategy=strategy, backend=name)
        oracle, oracle_grads = case.evaluate("oracle", needs)
        for key in outputs:
            error = (out[key].double() - oracle[key].double()).abs().max()
            assert error <= 5e-6, (strategy, key)
        # half precision rounds twice, the gradient's tile and the gradient, by half an eps each
        rounding = max(torch.finfo(dtype).eps, 2e-6)
        for key in needs:
            # exactly 0 where the label alone is left
            error = (grads[key].double() - oracle_grads[key]).abs().max()
            assert error <= rounding * oracle_grads[key].abs().max(), (strategy, key)


def test_far_reference(backend):
    """The kept exponentials survive logits that rise by hundreds after the first vocab tile."""
    name, device = backend
    case = make_case(rows=12, H=16, V=900, dtype=torch.bfloat16, device=device, bias=True)
    case.tensors["bias"][:] = torch.linspace(-400, 400, 900, device=device)
    case.labels[:] = torch.arange(860, 872, device=device)
    for strategy, needs in (("direction", ("hidden",)), ("resident", ("hidden",))):
        out, grads = case.evaluate("op", needs, strategy=strategy, backend=name)
        oracle, oracle_grads = case.evaluate("oracle", needs)
        assert torch.allclose(out["logps"].double(), oracle["logps"], rtol=1e-5)
        assert relative_norm(grads["hidden"], oracle_grads["hidden"]) <= 2.7e-3


def test_poisoned_rows(backend):
    """A row with a NaN is NaN alone, forward and grad_hidden; the same without a finite logit."""
    name, device = backend
    case = make_case(rows=7, H=8, V=90, device=device, ignored=0.0)
    only = [i == 3 for i in range(7)]
    clean = case.tensors["hidden"].clone()
    # the second one makes every logit of its row -inf
    case.tensors["weight"][:, 2] = 1.0
    for bad in (float("nan"), -INF):
        case.tensors["hidden"] = clean.clone()
        case.tensors["hidden"][3, 2] = bad
        for strategy in ("direction", "recompute"):
            out, grads = case.evaluate("op", ("hidden",), strategy=strategy, backend=name)
            assert out["logps"].isnan().tolist() == only
            assert grads["hidden"].isnan().any(-1).tolist() == only


def test_large_fp16_logits(backend):
    """fp16 inputs whose logits leave fp16's range have the log-probs of fp32 logits."""
    name, device = backend
    case = make_case(rows=16, H=16, V=120, dtype=torch.float16, device=device, ignored=0.0)
    case.tensors["hidden"] *= 5e3
    case.tensors["weight"] *= 20
    out, _ = case.evaluate("op", (), backend=name)
    oracle, _ = case.evaluate("oracle", ())
    assert oracle["logsumexp"].min() > torch.finfo(torch.float16).max
    torch.testing.assert_close(out["logps"].double(), oracle["logps"], rtol=1e-6, atol=0)


def test_noncontiguous(backend):
    """Strided, transposed, expanded and offset views give the bits of contiguous ones."""
    name, device = backend
    base = torch.randn(3, 24, 40, device=device)
    head = torch.randn(40, 200, device=device)
    labels = torch.randint(0, 200, (3, 24), device=device)
    labels[0, :5] = -100
    views = {
        "step": (base[:, ::2], labels[:, ::2]),
        "slice": (base[:, :-1], labels[:, 1:]),
        "offset": (base.narrow(2, 1, 39), labels),
        "expanded": (base[0, :1].expand(24, 40), labels[1]),
        "transposed": (base.transpose(0, 1), labels.t()),
    }
    for kind, (hidden, y) in views.items():
        weight = head.t()[:, : hidden.shape[-1]]
        results = []
        for h, w in ((hidden, weight), (hidden.contiguous(), weight.contiguous())):
            h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
            out = linear_logprob(h, w, y, backend=name)
            out.logps.sum().backward()
            results.append((out.logps.detach(), h.grad, w.grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), kind


def test_expanded_upstream_gradient(backend):
    """What mean() sends back has stride 0 and the bits of a gradient that has its own memory."""
    name, device = backend
    base = torch.randn(3, 24, 40, device=device)
    head = torch.randn(40, 200, device=device)
    labels = torch.randint(0, 200, (3, 24), device=device)
    hidden = base.clone().requires_grad_()
    linear_logprob(hidden, head.t(), labels, backend=name).logps.mean().backward()
    again = base.clone().requires_grad_()
    grad = torch.full((3, 24), 1 / 72, device=device)
    linear_logprob(again, head.t(), labels, backend=name).logps.backward(grad)
    assert torch.equal(hidden.grad, again.grad)


def test_small_fp16_gradients(backend):
    """An upstream of 1e-7 loses only the last cast to fp16; scaled by 65536, nothing."""
    name, device = backend
    case = make_case(rows=40, H=32, V=300, dtype=torch.float16, device=device, ignored=0.0)
    # unscaled, rounding before the products would lose what the last cast has not lost already
    for scale, times_floor in ((1.0, 1.02), (65536.0, 1.6)):
        case.upstream["logps"] = torch.full((40,), 1e-7 * scale, device=device)
        for strategy, needs in STRATEGIES[1:]:
            needs = tuple(key for key in needs if key in ("hidden", "weight"))
            _, grads = case.evaluate("op", needs, strategy=strategy, backend=name)
            _, oracle_grads = case.evaluate("oracle", needs)
            for key in needs:
                exact = oracle_grads[key]
                floor = relative_norm(exact.to(torch.float16), exact)
                assert relative_norm(grads[key], exact) <= times_floor * floor, key


def test_chunks(backend):
    """The error of the gradients does not grow with the number of chunks they are summed over."""
    name, device = backend
    if backend == ("triton", "cpu"):
        pytest.skip("as many columns as chunks need are minutes in the interpreter")
    case = make_case(rows=256, H=64, V=9000, dtype=torch.bfloat16, device=device, ignored=0.0)
    errors = []
    _, oracle_grads = case.evaluate("oracle", ("hidden", "weight"))

    def run(budget):
        settings = {"strategy": "recompute", "budget_bytes": budget, "backend": name}
        return case.evaluate("op", ("hidden", "weight"), **settings)

    for budget in (1 << 30, smallest_budget(run)):
        _, grads = run(budget)
        errors.append([relative_norm(grads[k], oracle_grads[k]) for k in ("hidden", "weight")])
    assert all(b <= 1.1 * a for a, b in zip(*errors, strict=True))


def test_double_backward(backend):
    """A double backward raises instead of dropping the second order."""
    name, device = backend
    hidden = torch.randn(4, 8, device=device, requires_grad=True)
    weight = torch.randn(30, 8, device=device)
    out = linear_logprob(hidden, weight, torch.arange(4, device=device), backend=name)
    with pytest.raises(RuntimeError, match="once_differentiable: double backward unsupported"):
        torch.autograd.grad(out.logps.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend, reentrant):
    """Activation checkpointing gives the same bits."""
    name, device = backend
    case = make_case(rows=12, H=8, V=70, device=device)
    grads = []
    for wrap in (False, True):
        hidden = case.tensors["hidden"].clone().requires_grad_()
        weight = case.tensors["weight"].clone().requires_grad_()

        def run(h, w):
            return linear_logprob(h, w, case.labels, backend=name).logps

        out = (
            checkpoint(run, hidden, weight, use_reentrant=reentrant)
            if wrap
            else run(hidden, weight)
        )
        out.sum().backward()
        grads.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast(backend):
    """Under autocast products read bf16 operands; gradients keep their dtype."""
    name, device = backend
    case = make_case(rows=24, H=32, V=260, device=device, bias=True)
    rounded = type(case)(
        {k: None if v is None else v.bfloat16().float() for k, v in case.tensors.items()},
        case.labels,
        case.options,
        case.upstream,
    )
    oracle, oracle_grads = rounded.evaluate("oracle", ("hidden", "weight"))
    for strategy, needs in (("direction", ("hidden",)), ("recompute", ("hidden", "weight"))):
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            out, grads = case.evaluate("op", needs, strategy=strategy, backend=name)
        assert (out["logps"].double() - oracle["logps"]).abs().max() <= 2e-5
        for key in needs:
            assert grads[key].dtype == torch.float32
            assert relative_norm(grads[key], oracle_grads[key]) <= 2.7e-3


def test_threads():
    """Eight threads at once give the bits of one."""
    case = make_case(rows=64, H=16, V=500)
    expected, expected_grads = case.evaluate("op", ("hidden", "weight"), backend="torch")
    results = [None] * 8

    def work(i):
        results[i] = case.evaluate("op", ("hidden", "weight"), backend="torch")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, grads in results:
        assert torch.equal(out["logps"], expected["logps"])
        assert torch.equal(grads["weight"], expected_grads["weight"])


def test_ties(backend):
    """is_top1: the first of equal maxima wins, inside a tile and across tiles."""
    name, device = backend
    hidden = torch.ones(3, 4, device=device)
    weight = torch.zeros(400, 4, device=device)
    weight[[5, 9, 390]] = 1.0
    labels = torch.tensor([5, 9, 390], device=device)
    out = linear_logprob(hidden, weight, labels, outputs=("is_top1",), backend=name)
    assert out.is_top1.tolist() == [True, False, False] and out.logps is None


_INT32_SCRIPT = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from spo_kernels import linear_logprob
# the rows of hidden lie 2**30 elements apart: the last one starts past 2**31
storage = torch.empty(2**31 + 64, dtype=torch.float16)
hidden = storage.as_strided((3, 16), (2**30, 1))
hidden.copy_(torch.arange(48.0).view(3, 16) / 48)
weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).half()
labels = torch.tensor([1, 2, 3])
far = linear_logprob(hidden, weight, labels, backend="triton").logps
near = linear_logprob(hidden.clone(), weight, labels, backend="triton").logps
assert torch.equal(far, near), (far, near)
"""


def test_large_offsets():
    """Rows that start past 2**31 elements are read where they lie, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _INT32_SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_large_offsets_gpu(cuda_device):
    """A head of V * H = 2.2e9 elements; rows at both ends against torch."""
    V, H = 262_144, 8448
    weight = torch.randn(V, H, device=cuda_device, dtype=torch.bfloat16)
    hidden = torch.randn(4, H, device=cuda_device, dtype=torch.bfloat16) / H**0.5
    labels = torch.tensor([0, 1, V - 2, V - 1], device=cuda_device)
    out = linear_logprob(hidden, weight, labels)
    expected = (hidden.float() @ weight.float().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(out.logps, expected, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("strategy", "needs"),
    [
        ("direction", ("hidden",)),
        ("resident", ("hidden", "weight")),
        ("recompute", ("hidden", "weight")),
    ],
    ids=str,
)
def test_large_tiles_gpu(cuda_device, strategy, needs):
    """Exponentials and tiles of N * V = 2.2e9; the last rows against themselves alone."""
    N, V, H, last = 16_500, 131_072, 64, 100
    hidden = torch.randn(N, H, device=cuda_device, dtype=torch.bfloat16)
    weight = torch.randn(V, H, device=cuda_device, dtype=torch.bfloat16) / 8
    labels = torch.randint(V, (N,), device=cuda_device)
    # only the last rows count, so the head's gradient is theirs alone
    upstream = torch.zeros(N, device=cuda_device)
    upstream[-last:] = torch.randn(last, device=cuda_device)
    found = []
    for rows in (slice(0, N), slice(N - last, N)):
        leaves = {"hidden": hidden[rows].clone(), "weight": weight.clone()}
        for name in needs:
            leaves[name].requires_grad_()
        out = linear_logprob(
            leaves["hidden"],
            leaves["weight"],
            labels[rows],
            strategy=strategy,
            budget_bytes=16 << 30,
        )
        out.logps.backward(upstream[rows])
        found.append((out.logps[-last:], *(leaves[name].grad for name in needs)))
    assert torch.equal(found[0][0], found[1][0])
    for name, whole, alone in zip(needs, found[0][1:], found[1][1:], strict=True):
        whole = whole[-last:] if name == "hidden" else whole
        assert relative_norm(whole, alone) < 5e-3


def test_views_of_labels_and_lora(backend):
    """Every row scored: strided or expanded labels and a column slice as LoRA b are read right."""
    name, device = backend
    case = make_case(rows=12, H=8, V=60, device=device, lora=True, ignored=0.0)
    wide = torch.randn(60, 9, device=device)
    hidden, weight, a = (case.tensors[key] for key in ("hidden", "weight", "lora_a"))
    strided = torch.stack((case.labels, case.labels * 0), 1).flatten()[::2]
    for labels in (strided, torch.tensor(7, device=device).expand(12)):
        got = linear_logprob(hidden, weight, labels, lora=(a, wide[:, :5]), backend=name)
        expected = linear_logprob(
            hidden, weight, labels.clone(), lora=(a, wide[:, :5].clone()), backend=name
        )
        assert torch.equal(got.logps, expected.logps)


def test_outputs_are_owned(backend):
    """An output may be changed in place, and what was kept for the backward is not touched."""
    name, device = backend
    case = make_case(rows=6, H=8, V=40, device=device, ignored=0.0, upstream=("entropy",))
    grads = []
    for edit in (False, True):
        hidden = case.tensors["hidden"].clone().requires_grad_()
        out = linear_logprob(
            hidden, case.tensors["weight"], case.labels, outputs=("entropy",), backend=name
        )
        total = out.entropy.sum()
        if edit:
            out.entropy.detach()[0] = 5.0
            out.entropy[1] = 0.0
        total.backward()
        grads.append(hidden.grad)
    assert torch.equal(*grads)


def test_impossible_label(backend):
    """A label whose logit is -inf: log-prob -inf, and a finite entropy gradient."""
    name, device = backend
    case = make_case(
        rows=5, H=8, V=40, device=device, bias=True, ignored=0.0, upstream=("entropy",)
    )
    case.labels[2] = 7
    case.tensors["bias"][7] = -INF
    for strategy in ("resident", "recompute"):
        out, grads = case.evaluate(
            "op", ("hidden",), outputs=ALL_OUTPUTS, strategy=strategy, backend=name
        )
        oracle, oracle_grads = case.evaluate("oracle", ("hidden",))
        assert out["logps"][2] == -INF and not out["is_top1"][2]
        assert relative_norm(grads["hidden"], oracle_grads["hidden"]) <= 1e-5
    case.tensors["hidden"][1] = float("nan")
    case.labels[1] = 0
    out, _ = case.evaluate("op", (), outputs=("is_top1",), backend=name)
    assert not out["is_top1"][1]


@pytest.mark.parametrize("V", [2, 200, 513])
def test_softcap_of_small_logits(backend, V):
    """Where the cap hardly bends, capped logits are as near as eager's, not as near as the cap."""
    name, device = backend
    case = make_case(rows=40, H=17, V=V, device=device, softcap=30.0, logit_scale=0.7, ignored=0.0)
    compare(case, ("hidden",), strategy="recompute", backend=name)


def test_overflowing_logit(backend):
    """A logit of -inf without a bias has no part in the entropy, wherever the labels are."""
    name, device = backend
    case = make_case(rows=2, H=16, V=200, device=device, ignored=0.0, upstream=("entropy",))
    case.tensors["hidden"].abs_()
    case.tensors["weight"][101] = -3e38
    for labels in ((5, 6), (5, 102)):
        case.labels.copy_(torch.tensor(labels))
        out, grads = case.evaluate("op", ("hidden",), outputs=("entropy",), backend=name)
        oracle, oracle_grads = case.evaluate("oracle", ("hidden",))
        assert torch.allclose(out["entropy"].double(), oracle["entropy"], atol=1e-5)
        assert relative_norm(grads["hidden"], oracle_grads["hidden"]) <= 1e-5


def test_policy_equals_reference(backend):
    """The same model as policy and as frozen reference has log-probs of the same bits."""
    name, device = backend
    case = make_case(rows=50, H=24, V=310, dtype=torch.bfloat16, device=device)
    policy, _ = case.evaluate("op", ("hidden", "weight"), outputs=ALL_OUTPUTS, backend=name)
    reference, _ = case.evaluate("op", (), backend=name)
    assert torch.equal(policy["logps"], reference["logps"])
