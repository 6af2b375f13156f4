"""``torch.compile(fullgraph=True)`` of the losses: custom ops, and what is traced."""

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.library import opcheck

from spo_kernels import (
    bradley_terry_loss,
    degree_loss,
    linear_preference_loss,
    listwise_preference_loss,
    preference_loss,
    unpaired_preference_loss,
)
from spo_kernels.calls.loss_table import PARAMETERS
from spo_kernels.calls.preference_loss_checks import check_options
from spo_kernels.ops.loss_op import _packed

H, V, K = 16, 43, 3


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def compiled(function, dynamic: bool | None = False, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def randn(*shape: int, device: str = "cpu", grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device).requires_grad_(grad)


def check_ops(name: str, tensors, call) -> None:
    """Hold both ops of a loss against their schema, fake kernels and autograd formula."""
    ops = torch.ops.spo_kernels
    opcheck(getattr(ops, f"{name}_fwd").default, (*tensors, *call))
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if str(func).startswith(f"spo_kernels.{name}_bwd"):
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    losses = getattr(ops, f"{name}_fwd")(*tensors, *call)[0]
    with Recorder():
        losses.sin().sum().backward()
    ((backward, arguments),) = seen
    opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_opcheck_degree(needs, backend):
    name, device = backend
    tensors = [randn(9, H, device=device), randn(K, H, device=device), randn(K, device=device)]
    tensors = [t.bfloat16().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    levels = torch.tensor([0, 1, 2, 0, 1, -1, 2, 2, 1], dtype=torch.int8, device=device)
    offsets = torch.tensor([0, 3, 3, 8], device=device)
    call = ([name, "centered"], None, None)
    check_ops("degree_loss", (*tensors, levels, offsets), call)


def pair_call(loss_type, ld_alpha=None):
    options = check_options(
        loss_type=loss_type,
        loss_weights=None,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        ld_alpha=ld_alpha,
        **{row.name: row.default for row in PARAMETERS},
    )
    words, numbers, traced = _packed(options)
    return ["triton", *words], numbers, traced


@pytest.mark.parametrize("case", ["bradley_terry", "preference", "aot", "bco", "kto", "listwise"])
def test_opcheck_kernels(case, backend):
    name, device = backend
    if name == "torch":
        pytest.skip("traced whole, without an op")
    x, y = randn(4, 6, device=device, grad=True), randn(4, 7, device=device)[:, :6]
    offsets = torch.tensor([0, 5, 11, 20], device=device)
    lengths = torch.tensor([5, 6, 1, 9], device=device)
    if case == "bradley_terry":
        tensors, call = (x[0].detach().requires_grad_(), y[0], None), (["triton"], [0.1], None)
        check_ops("bradley_terry_loss", tensors, call)
    elif case == "preference":
        masks = (y > 0, x.detach() > 0)
        chosen, rejected = (y, masks[0], None, None, None), (y[:, 0], masks[1], None, None, None)
        third = (None, None, torch.tensor([0, 5, 11, 11, 20], device=device), lengths, None)
        tensors = (x, y, x, *chosen, *rejected, *third, y[:, 1].abs(), None, None)
        check_ops("preference_loss", tensors, pair_call(["sigmoid", "simpo", "nll"], 0.5))
    elif case == "aot":
        sums = x[:, 0].detach().requires_grad_()
        tensors = (sums, y[:, 1], None, *(None,) * 18)
        check_ops("preference_loss", tensors, pair_call("aot"))
    elif case == "listwise":
        call = (["triton", "list_mle"], [0.1, 1.0, 25.0], None)
        check_ops("listwise_preference_loss", (x, y, x.detach(), y > 0), call)
    else:
        given = {"bco": (None, None, None), "kto": (y[0], y[1], None)}[case]
        places = offsets if case == "kto" else None
        good = torch.tensor([True, False, True, True], device=device)[: 3 if case == "kto" else 4]
        call = (["triton", case, "tokens"], [0.1, 1.0, 0.5], None)
        tensors = (x, y, good, places, *given)
        check_ops("unpaired_preference_loss", tensors, call)


def degree(x, y, beta, backend):
    levels = (x.detach() * 2).round().clamp(-1, 2).to(torch.int8).flatten()
    offsets = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
    hidden = x.flatten()[:, None] * y[0, :4]
    return degree_loss(hidden, levels, offsets, y[:K, :4] * beta, backend=backend)


def bradley_terry(x, y, beta, backend):
    return bradley_terry_loss(
        x[:, :1], y[:, :1], y[:, 1], center_rewards_coefficient=beta, backend=backend
    )


def preference(x, y, beta, backend):
    lengths = (y[:, 0] * 4).abs().int()
    offsets = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
    return preference_loss(
        x,
        y,
        y[:, 0],
        y[:, 1],
        loss_type=["sigmoid", "simpo"],
        loss_weights=[1.0, beta],
        beta=beta,
        chosen_mask=y > 0,
        rejected_offsets=offsets,
        rejected_lengths=lengths,
        backend=backend,
    )


def coupled(x, y, beta, backend):
    return preference_loss(x[:, 0], y[:, 0], loss_type=["aot", "hinge"], beta=beta, backend=backend)


def unpaired(x, y, beta, backend):
    return unpaired_preference_loss(x, y, y[:, 0] > 0, loss_type="bco", beta=beta, backend=backend)


def packed_unpaired(x, y, beta, backend):
    offsets = torch.arange(x.shape[0], device=x.device) * x.shape[1]
    good, samples = y[1:, 0] > 0, {"kl_logps": y[0], "ref_kl_logps": y[1]}
    return unpaired_preference_loss(
        x, y[1:, 0], good, beta=beta, segment_offsets=offsets, backend=backend, **samples
    )


def listwise(x, y, beta, backend):
    return listwise_preference_loss(
        x.T.contiguous().T, y, mask=y > -1, loss_type="list_mle", beta=beta, backend=backend
    )


LOSSES = [degree, bradley_terry, preference, coupled, unpaired, packed_unpaired, listwise]


def results(step, *arguments):
    """Return the outputs and the gradient of the first argument."""
    x = arguments[0].detach().clone().requires_grad_()
    out = step(x, *arguments[1:])
    assert [value.requires_grad for value in out] == [True, *(False,) * (len(out) - 1)]
    out[0].sin().sum().backward()
    return [*out, x.grad]


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, backend):
    """One node, the bits of an eager call, and no graph for another number of rows or beta."""
    name, device = backend
    found = []

    def counting(module, inputs):
        nodes = (str(node.target) for node in module.graph.nodes)
        found.append(sum(target.startswith("spo_kernels") for target in nodes))
        return lookup_backend("aot_eager")(module, inputs)

    def step(x, y, beta):
        return loss(x * 1.0, y, beta, name)

    # sizes and numbers are constants of the first graph, and symbols of the second
    traced = compiled(step, dynamic=None, backend=counting)
    for rows, beta in ((4, 0.1), (5, 0.25), (9, 0.7), (6, 0.3)):
        arguments = randn(rows, 5, device=device), randn(rows, 6, device=device)[:, 1:], beta
        assert_same(results(traced, *arguments), results(step, *arguments))
    # the torch backend is traced, except where its loop would make a graph for each row count
    assert found == [int(loss is degree or name == "triton")] * 2


def preferences(x, y, beta, backend, **settings):
    labels = (y.abs() * 10).long()
    labels = labels.masked_fill(y < settings.pop("least"), -100)
    third = settings.pop("third", False)
    return linear_preference_loss(
        x[..., None] * y[0, 0],
        torch.arange(V, device=x.device)[:, None] / V,
        labels,
        None if third else y * 0.5,
        response_labels=labels[: len(labels) // 2].clone() if third else None,
        beta=beta,
        backend=backend,
        **settings,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"least": -0.3, "loss_type": ["sigmoid", "sft"]},
        {"least": -9.0, "strategy": "recompute", "loss_type": ["cpo", "nll"], "third": True},
        {"least": -9.0, "strategy": "resident", "budget_bytes": 1 << 20},
    ],
    ids=["ignored", "third", "budget"],
)
def test_linear_preference_loss(settings, backend):
    """One graph, the bits of an eager call of the same strategy, ignored rows to rounding."""
    name, device = backend

    def step(x, y, beta):
        return preferences(x, y, beta, name, **settings)

    traced = compiled(step, dynamic=True)
    for pairs, beta in ((2, 0.1), (3, 0.3)):
        x, y = (randn(2 * pairs, n, device=device) for n in (5, 6))
        arguments = x, y[:, 1:], beta
        found, wanted = results(traced, *arguments), results(step, *arguments)
        if "strategy" in settings:
            assert_same(found, wanted)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


def test_linear_preference_loss_bad_label():
    """Without a host read a bad label is NaN in its pair's loss, and in no other's."""
    hidden, weight, labels = randn(4, 3, H), randn(V, H), torch.ones(4, 3, dtype=torch.long)
    labels[3, 1] = V
    losses = compiled(linear_preference_loss)(hidden, weight, labels).losses
    assert losses.isnan().tolist() == [False, True]


def test_errors():
    """Errors keep their text inside dynamo's report."""
    cases = [
        (preference_loss, (randn(3), randn(4)), {}, "preference_loss: rejected_logps must have"),
        (preference_loss, (randn(3), randn(3)), {"beta": 0.0}, "preference_loss: beta must be"),
        (bradley_terry_loss, (randn(3), randn(4)), {}, "rejected_rewards must have shape"),
        (listwise_preference_loss, (randn(3, 1),) * 2, {}, "logps must have 2 to 64 columns"),
        (
            unpaired_preference_loss,
            (randn(3), None, randn(3)),
            {"loss_type": "bco"},
            "is_desirable must",
        ),
        (degree_loss, (randn(3, H),) * 4, {}, "removal_levels must have dtype int8"),
        (
            linear_preference_loss,
            (randn(2, 3, H), randn(V, H), torch.ones(2, 3, dtype=torch.long)),
            {"strategy": "pairwise"},
            "strategy must be 'auto' or one of linear_logprob's under torch.compile",
        ),
    ]
    for function, arguments, settings, text in cases:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=text):
            compiled(function)(*arguments, **settings)
