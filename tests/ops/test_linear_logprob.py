"""``linear_logprob``: every strategy on both backends against the fp64 reference and TRL."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spo_kernels import linear_logprob
from spo_kernels.calls import layout
from spo_kernels.reference.linear_logprob import linear_logprob_reference
from tests.helpers.logprob_cases import (
    DIFFERENTIABLE,
    STRATEGIES,
    TRANSFORMS,
    case_in_float,
    compare,
    make_case,
    relative_norm,
)

edges = st.sampled_from([1, 31, 32, 33, 63, 64, 65, 129, 259])


@pytest.mark.parametrize("options", TRANSFORMS, ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("strategy", "needs"), STRATEGIES, ids=lambda v: str(v)[:24])
def test_forward(backend, strategy, needs, dtype, options, poisoned_empty):
    """Every output and every gradient of every strategy, with bias, LoRA and ignored rows."""
    name, device = backend
    case = make_case(
        rows=75, H=40, V=611, dtype=dtype, device=device, bias=True, lora=True, **options
    )
    compare(case, needs, strategy=strategy, backend=name)


@settings(max_examples=6)
@given(rows=st.one_of(edges, st.integers(1, 40)), H=edges, V=st.one_of(edges, st.integers(2, 700)))
@example(rows=1, H=1, V=1)
@example(rows=130, H=31, V=1025)
@example(rows=17, H=123, V=4099)
def test_gradients(backend, rows, H, V):
    """Sizes that are no multiple of a tile, no bias, no LoRA: all strategies are right."""
    name, device = backend
    if backend == ("triton", "cpu"):
        V = min(V, 1025)
    case = make_case(rows=rows, H=H, V=V, device=device, seed=rows * 7 + V)
    for strategy, needs in (
        ("direction", ("hidden",)),
        ("resident", ("hidden", "weight")),
        ("recompute", ("hidden", "weight")),
    ):
        compare(case, needs, outputs=("logps",), strategy=strategy, backend=name, name=strategy)


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "capped"])
@pytest.mark.parametrize("arrives", [*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE])
def test_upstream_gradients(backend, arrives, softcap):
    """Each differentiable output alone and all together, through every strategy."""
    name, device = backend
    sizes = {"rows": 20, "H": 24, "V": 150}
    extras = {"bias": True, "lora": True, "softcap": softcap, "upstream": arrives}
    # with seed 0 a kept tile's gradient is 0.5% over the budget on some BLAS
    case = make_case(**sizes, device=device, **extras, seed=1)
    for strategy, needs in STRATEGIES[1:]:
        compare(case, needs, strategy=strategy, backend=name, name=strategy)


@pytest.mark.parametrize("mask", range(1, 32))
def test_needs_input_grad(backend, mask):
    """Any subset of inputs may need a gradient; frozen ones get none."""
    name, device = backend
    if backend == ("triton", "cpu") and mask % 5:
        pytest.skip("a fifth of the subsets under the interpreter")
    case = make_case(rows=20, H=16, V=90, device=device, bias=True, lora=True)
    needs = tuple(t for i, t in enumerate(case.tensors) if mask >> i & 1)
    compare(case, needs, outputs=("logps",), backend=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("peaked", [False, True], ids=["random", "peaked"])
def test_accuracy_bars(backend, dtype, peaked):
    """README's accuracy bars at N 512, H 256, V 8192 (smaller when interpreted)."""
    name, device = backend
    rows, H, V = (64, 64, 1024) if backend == ("triton", "cpu") else (512, 256, 8192)
    case = make_case(rows=rows, H=H, V=V, dtype=dtype, device=device, peaked=peaked, ignored=0.0)
    oracle, oracle_grads = case.evaluate("oracle", ("hidden", "weight"))
    # the bias is what a long sum of log-probs keeps of the error, its mean size what it averages
    logps_bar, mean_bar, bias_bar = 2e-5, 5e-6, 1e-6
    grad_bar = {torch.float32: 2e-6, torch.bfloat16: 2.7e-3, torch.float16: 3.3e-4}[dtype]
    if backend == ("triton", "cpu"):
        # the bars were measured on the full shape; a small sample scatters around them
        grad_bar *= 1.05
    for strategy, needs in (
        ("direction", ("hidden",)),
        ("resident", ("hidden", "weight")),
        ("recompute", ("hidden", "weight")),
    ):
        out, grads = case.evaluate("op", needs, strategy=strategy, backend=name)
        error = out["logps"].double() - oracle["logps"]
        assert error.abs().max() <= logps_bar
        assert error.abs().mean() <= mean_bar
        assert error.mean().abs() <= bias_bar
        for key in needs:
            mine = relative_norm(grads[key], oracle_grads[key])
            assert mine <= grad_bar, f"{strategy} grad_{key}: {mine:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("peaked", [False, True], ids=["random", "peaked"])
def test_no_worse_than_trl(backend, dtype, peaked):
    """Log-probs and gradients beside TRL's own chunked function on the same tensors."""
    name, device = backend
    case = make_case(rows=64, H=64, V=1024, dtype=dtype, device=device, peaked=peaked, ignored=0.0)
    trl_logps, trl_grads = run_trl(case)
    oracle, oracle_grads = case.evaluate("oracle", ("hidden", "weight"))
    trl_error = (trl_logps.double() - oracle["logps"]).abs().max()
    for strategy, needs in (
        ("direction", ("hidden",)),
        ("resident", ("hidden", "weight")),
        ("recompute", ("hidden", "weight")),
    ):
        out, grads = case.evaluate("op", needs, strategy=strategy, backend=name)
        error = (out["logps"].double() - oracle["logps"]).abs().max()
        assert error <= trl_error * 1.5 + 2e-6
        for key in needs:
            mine = relative_norm(grads[key], oracle_grads[key])
            theirs = relative_norm(trl_grads[key], oracle_grads[key])
            if dtype != torch.float32:
                # where logits are small both are left with the rounding of the same tile
                assert mine <= 1.02 * theirs, f"{strategy} grad_{key}: {mine:.2e}, TRL {theirs:.2e}"


def run_trl(case):
    """TRL's own chunked function on the same tensors."""
    trl = pytest.importorskip("trl.kernels.chunked_logprob")
    leaves = {k: case.tensors[k].detach().clone().requires_grad_() for k in ("hidden", "weight")}
    logps = trl.ChunkedLogProbFunction.apply(
        leaves["hidden"], leaves["weight"], None, case.labels, 1.0, 32768, None, 1.0, ("log_probs",)
    )[0]
    logps.backward(case.upstream["logps"].to(logps.dtype))
    return logps.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def test_direction_does_not_cancel(backend):
    """Rows whose label has p near 1: the row error stays at that of fp32 p rounded once."""
    name, device = backend
    case = make_case(rows=48, H=32, V=500, dtype=torch.bfloat16, device=device, ignored=0.0)
    hidden = case.tensors["hidden"]
    # turn each row onto its label's weight: p_label > 0.99 with a wide spread of 1 - p
    strength = torch.linspace(8, 20, 48, device=hidden.device)[:, None]
    direction = torch.nn.functional.normalize(case.tensors["weight"][case.labels].float(), dim=-1)
    case.tensors["hidden"] = (direction * strength).to(torch.bfloat16)
    oracle, oracle_grads = case.evaluate("oracle", ("hidden",))
    sure = oracle["logps"].exp() > 0.99
    assert sure.sum() >= 10
    _, grads = case.evaluate("op", ("hidden",), strategy="direction", backend=name)
    _, eager = case_in_float(case).evaluate("eager", ("hidden",))
    exact = oracle_grads["hidden"]

    def row_error(grad):
        return ((grad.double() - exact).norm(dim=-1) / exact.norm(dim=-1))[sure]

    # fp32 p, rounded to bf16 once on its way out; its own 1 - p cancels where p is nearly 1
    floor = row_error(eager["hidden"].to(torch.bfloat16))
    assert (row_error(grads["hidden"]) <= 2 * torch.maximum(floor, floor.median())).all()


def test_agrees_with_itself(backend):
    """A row's log-prob has the same bits in every strategy, batch split and budget."""
    name, device = backend
    case = make_case(rows=70, H=48, V=9000 if name == "torch" else 700, device=device, ignored=0.0)
    whole = case.evaluate("op", (), backend=name)[0]["logps"]
    for strategy, needs in STRATEGIES[1:]:
        if "lora_a" not in needs:
            again, _ = case.evaluate("op", needs, strategy=strategy, backend=name)
            assert torch.equal(whole, again["logps"]), strategy
    hidden, weight = case.tensors["hidden"], case.tensors["weight"]
    outputs = ("logps", "entropy", "is_top1")
    for split in (1, 16, 33, 69):
        part = linear_logprob(
            hidden[:split], weight, case.labels[:split], outputs=outputs, backend=name
        )
        assert torch.equal(whole[:split], part.logps), split
    small = linear_logprob(hidden, weight, case.labels, budget_bytes=3 << 20, backend=name)
    assert torch.equal(whole, small.logps)


@pytest.mark.parametrize("strategy", ["direction", "resident", "recompute"])
def test_repeatable(backend, strategy):
    """Runs are bit-equal, gradients linear in g, a second backward repeats the first."""
    name, device = backend
    case = make_case(rows=33, H=20, V=333, device=device)
    needs = ("hidden",) if strategy == "direction" else ("hidden", "weight")
    runs = [case.evaluate("op", needs, strategy=strategy, backend=name) for _ in range(3)]
    for _, grads in runs[1:]:
        for key in needs:
            assert torch.equal(grads[key], runs[0][1][key])
    leaves = {k: case.tensors[k].clone().requires_grad_(k in needs) for k in ("hidden", "weight")}
    out = linear_logprob(
        leaves["hidden"], leaves["weight"], case.labels, strategy=strategy, backend=name
    )
    g = case.upstream["logps"]
    inputs = [leaves[key] for key in needs]
    first = torch.autograd.grad(out.logps, inputs, g, retain_graph=True)
    double = torch.autograd.grad(out.logps, inputs, 2 * g, retain_graph=True)
    again = torch.autograd.grad(out.logps, inputs, g, retain_graph=True)
    nothing = torch.autograd.grad(out.logps, inputs, 0 * g)
    for a, b, c, d in zip(first, double, again, nothing, strict=True):
        assert torch.equal(2 * a, b) and torch.equal(a, c) and not d.any()


@pytest.mark.parametrize("strategy", ["direction", "recompute", "resident"])
def test_gradcheck(strategy):
    """fp64 gradcheck of the torch backend and of the reference that serves as oracle."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    labels = torch.tensor([3, -100, 0, 6])
    frozen = strategy == "direction"
    hidden, weight, bias, a, b = leaf(4, 5), leaf(7, 5), leaf(7), leaf(4, 2), leaf(7, 2)
    options = {"temperature": 1.2, "logit_scale": 0.8, "softcap": 3.0}

    def op(hidden, weight, bias, a, b):
        out = linear_logprob(
            hidden, weight, labels, bias=bias, lora=(a, b), outputs=DIFFERENTIABLE,
            strategy=strategy, backend="torch", **options,
        )  # fmt: skip
        return out.logps, out.entropy, out.logsumexp, out.mean_logits

    def reference(hidden, weight, bias, a, b):
        out = linear_logprob_reference(hidden, weight, labels, bias=bias, lora=(a, b), **options)
        return tuple(out[name] for name in DIFFERENTIABLE)

    inputs = (hidden, weight, bias, a, b)
    if frozen:
        for tensor in (weight, bias, b):
            tensor.requires_grad_(False)
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradcheck(reference, inputs)


def test_reference_by_hand():
    """The oracle itself, on numbers one can check: logits 0, log 2, log 5."""
    hidden = torch.eye(1, dtype=torch.float64)
    weight = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64).log()
    out = linear_logprob_reference(hidden, weight, torch.tensor([1]))
    expected = {
        "logps": torch.tensor(0.25).log(),
        "logsumexp": torch.tensor(8.0).log(),
        "mean_logits": torch.tensor(10.0).log() / 3,
        "entropy": -sum(p * torch.tensor(p).log() for p in (0.125, 0.25, 0.625)),
        "log_sum_sq_probs": torch.tensor((1 + 4 + 25) / 64).log(),
    }
    for name, value in expected.items():
        assert out[name].item() == pytest.approx(value.item(), abs=1e-6), name
    assert not out["is_top1"].item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("most_rows", [0, 4096], ids=["library", "kernel"])
@pytest.mark.parametrize(("H", "V"), [(36, 611), (129, 300), (1, 1)], ids=str)
def test_engines_of_the_heads_gradient(backend, dtype, most_rows, H, V, monkeypatch):
    """Few rows take our kernel, many a library's product: each right, each where it should be."""
    name, device = backend
    if name == "torch":
        pytest.skip("has one engine")
    from spo_kernels.kernels import linear_logprob_bwd_weight

    launches, launch = [], linear_logprob_bwd_weight.linear_logprob_bwd_weight

    def recorded(*args, **settings):
        launches.append(args)
        launch(*args, **settings)

    monkeypatch.setattr(linear_logprob_bwd_weight, "linear_logprob_bwd_weight", recorded)
    monkeypatch.setattr(layout, "WEIGHT_KERNEL_ROWS", most_rows)
    case = make_case(rows=70, H=H, V=V, dtype=dtype, device=device)
    for strategy in ("resident", "recompute"):
        launches.clear()
        needs = ("hidden", "weight")
        compare(case, needs, outputs=("logps",), strategy=strategy, backend=name, name=strategy)
        assert bool(launches) == (most_rows > 0)
