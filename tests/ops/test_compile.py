"""``torch.compile(fullgraph=True)`` of ``linear_logprob`` and of a step around it."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.library import opcheck

from spo_kernels import degree_loss, linear_logprob, preference_loss
from spo_kernels.calls.linear_logprob import Settings
from spo_kernels.ops.linear_logprob_graph import _backward_op, _forward_op, _packed
from tests.helpers.logprob_cases import ALL_OUTPUTS, DIFFERENTIABLE

H, V = 16, 43


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def compiled(function, dynamic: bool = False, backend: str = "aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


@pytest.mark.parametrize("gathered", [False, True], ids=["all_rows", "gathered"])
@pytest.mark.parametrize(
    ("strategy", "needs", "outputs", "softcap"),
    [
        ("score", "", "logps,is_top1", None),
        ("direction", "hidden,lora_a", "logps,entropy", None),
        ("resident", "hidden,weight,bias", "logps,logsumexp,mean_logits", 3.0),
        ("recompute", "hidden,weight,lora_b", "logps,log_sum_sq_probs", None),
    ],
)
def test_opcheck(strategy, needs, outputs, softcap, gathered, backend):
    name, device = backend
    dtype, generator = torch.bfloat16, torch.Generator().manual_seed(0)
    shapes = {"hidden": (2, 4, H), "weight": (V, H), "bias": (V,), "lora_a": (2, 4, 3)}
    shapes["lora_b"] = (V, 3)
    tensors = [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(key in needs)
        for key, shape in shapes.items()
    ]
    places = torch.tensor([[0, 1, 1], [2, 0, 3]], device=device) if gathered else None
    labels = torch.arange(3 if gathered else 8, device=device)
    settings = _packed(
        Settings(
            backend=name,
            compute_dtype=dtype,
            needs_grad=frozenset(filter(None, needs.split(","))),
            outputs=frozenset(outputs.split(",")),
            softcap=softcap,
            strategy=strategy,
        )
    )
    arguments = (*tensors, labels, places, *settings)
    opcheck(_forward_op, arguments)
    if needs:
        tensors = [tensor.detach() for tensor in tensors]
        kept = _forward_op(*tensors, labels, places, *settings)[len(outputs.split(",")) :]
        upstream = [torch.randn(2, 4, generator=generator).to(device), None, None, None]
        opcheck(
            _backward_op, (upstream, *tensors, labels, places, kept, needs.split(","), *settings)
        )


def run(step, tensors, labels, **settings):
    """Return the outputs and gradients of a step on fresh leaves."""
    leaves = {
        name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    out = step(leaves, labels, **settings)
    total = sum(
        value.sin().sum()
        for name, value in out._asdict().items()
        if value is not None and name in DIFFERENTIABLE
    )
    if total.requires_grad:
        total.backward()
    return [*out, *(leaf.grad for leaf in leaves.values())]


def logprobs(leaves, labels, **settings):
    # a product first: the op's input is no leaf
    return linear_logprob(
        leaves["hidden"] * 1.0,
        leaves["weight"],
        labels,
        bias=leaves.get("bias"),
        lora=(leaves["lora_a"], leaves["lora_b"]) if "lora_b" in leaves else None,
        **settings,
    )


def inputs(
    batch: int,
    tokens: int,
    needs=("hidden", "weight", "bias", "lora_a", "lora_b"),
    device: str = "cpu",
):
    generator = torch.Generator().manual_seed(tokens)
    shapes = {"hidden": (batch, tokens, H), "weight": (V, H), "bias": (V,)}
    shapes |= {"lora_a": (batch, tokens, 3), "lora_b": (V, 3)}
    tensors = {
        name: torch.randn(shape, generator=generator).to(device).requires_grad_(name in needs)
        for name, shape in shapes.items()
    }
    return tensors, torch.randint(0, V, (batch, tokens), generator=generator).to(device)


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize(
    ("needs", "settings"),
    [
        ((), {"outputs": ALL_OUTPUTS}),
        (("hidden", "lora_a"), {"outputs": ("logps",)}),
        (("hidden", "weight", "bias", "lora_b"), {"outputs": ALL_OUTPUTS}),
        (("weight",), {"strategy": "recompute", "softcap": 5.0, "temperature": 1.3}),
        (("hidden",), {"strategy": "resident", "scored_rows": 10}),
    ],
)
def test_forward_and_gradients(needs, settings, backend):
    """Without ignored rows, or with their number, a graph has the bits of an eager call."""
    name, device = backend
    tensors, labels = inputs(2, 6, needs, device)
    if "scored_rows" in settings:
        labels[0, 1:3] = -100
    wanted = run(logprobs, tensors, labels, backend=name, **settings)
    assert_same(run(compiled(logprobs), tensors, labels, backend=name, **settings), wanted)


def test_ignored_rows():
    """What an ignored row holds, NaN too, never gets out; its own gradients are 0."""
    tensors, labels = inputs(2, 6)
    labels[0, 1:3] = -100
    wanted = run(logprobs, tensors, labels, outputs=ALL_OUTPUTS)
    with torch.no_grad():
        tensors["hidden"][0, 1:3] = tensors["lora_a"][0, 1] = torch.nan
    found = run(compiled(logprobs), tensors, labels, outputs=ALL_OUTPUTS)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    # outputs, grad_hidden, grad_lora_a
    for value in (*found[: len(ALL_OUTPUTS)], found[len(ALL_OUTPUTS)], found[-2]):
        assert not value[0, 1:3].any()


def test_bad_labels_and_counts_give_nan():
    tensors, labels = inputs(1, 4, ())
    labels[0] = torch.tensor([1, V, -3, -100])
    logps = compiled(logprobs)(tensors, labels).logps[0]
    assert logps.isnan().tolist() == [False, True, True, False] and logps[3] == 0
    labels[0] = torch.tensor([1, 2, 3, -100])
    assert compiled(logprobs)(tensors, labels, scored_rows=2).logps.isnan().all()


def test_dynamic_shapes():
    """Another number of rows reuses the graph and is right."""
    counters.clear()
    step = compiled(logprobs, dynamic=True)
    for shape in ((2, 6), (3, 7), (5, 9)):
        tensors, labels = inputs(*shape)
        wanted = run(logprobs, tensors, labels, outputs=ALL_OUTPUTS, softcap=5.0)
        assert_same(run(step, tensors, labels, outputs=ALL_OUTPUTS, softcap=5.0), wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_dynamic_shapes_across_strategies():
    """A budget that holds the kept exponentials of few rows only: two graphs, both right."""
    counters.clear()
    step = compiled(logprobs, dynamic=True)
    for tokens in (6, 9, 250, 300, 7):
        tensors, labels = inputs(2, tokens, ("hidden", "weight"))
        wanted = run(logprobs, tensors, labels, budget_bytes=150_000)
        assert_same(run(step, tensors, labels, budget_bytes=150_000), wanted)
    assert counters["stats"]["unique_graphs"] == 2


class Model(torch.nn.Module):
    """A causal model without attention, its head and a degree head."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = torch.nn.Embedding(V, H), torch.nn.Linear(H, H)
        self.head, self.degree = torch.nn.Linear(H, V, bias=False), torch.nn.Linear(H, 4)

    def forward(self, ids):
        return self.mix(self.embed(ids)).tanh()


def training_step(model, ids, labels, ref, levels, offsets):
    hidden, targets = model(ids), labels[:, 1:]
    out = linear_logprob(hidden[:, :-1], model.head.weight, targets, outputs=("logps", "entropy"))
    chosen, rejected = out.logps.chunk(2)
    ref_chosen, ref_rejected = ref[:, 1:].chunk(2)
    loss = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3).losses.mean()
    head = model.degree
    degree = degree_loss(hidden.flatten(0, 1), levels, offsets, head.weight, head.bias)
    return loss + 0.1 * degree.losses.mean(), out.entropy.detach().mean()


@pytest.mark.parametrize(
    ("backend", "autocast"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", False, marks=pytest.mark.slow),
    ],
)
def test_training_step(backend, autocast):
    torch.manual_seed(0)
    model, B, T = Model(), 4, 7
    ids = torch.randint(0, V, (B, T))
    levels = torch.randint(0, 4, (B * T,), dtype=torch.int8)
    labels = ids.masked_fill(torch.arange(T) < 2, -100)
    arguments = (model, ids, labels, torch.randn(B, T), levels, torch.arange(B + 1) * T)
    results = []
    for step in (training_step, compiled(training_step, backend=backend)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, entropy = step(*arguments)
        loss.backward()
        results.append([loss, entropy, *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_errors():
    """Errors keep their text: bare where the graph may break, inside dynamo's report where not."""
    tensors, labels = inputs(2, 6, ())
    cases = [
        ({"strategy": "fast"}, ValueError, "linear_logprob: strategy must be one of"),
        ({"validate": True}, NotImplementedError, "linear_logprob: validate must be left out"),
        ({"group": object()}, NotImplementedError, "linear_logprob: group must be left out"),
    ]
    for settings, error, text in cases:
        torch._dynamo.reset()
        with pytest.raises(error, match=text):
            torch.compile(logprobs, backend="eager")(tensors, labels, **settings)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="strategy must be one of"):
        compiled(logprobs)(tensors, labels, strategy="fast")
    with pytest.raises(Exception, match="budget_bytes must be at least"):
        compiled(logprobs)(tensors, labels, budget_bytes=1)
