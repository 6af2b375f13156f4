"""``linear_preference_loss``: every loss type and strategy against the fp64 references."""

import pytest
import torch

from spo_kernels.calls.loss_table import loss_type_of
from tests.helpers.linear_pair_cases import (
    SMALLEST,
    SPANS,
    WHOLE,
    compare,
    groups_of,
    make_batch,
    op,
    reference,
    run,
)
from tests.helpers.preference_cases import MIXES, OPTIONS


def is_coupled(names):
    """Whether ranks or a statistic of the batch tie the pairs together."""
    return any(row.couples_pairs for row in map(loss_type_of, names))


ALONE = [names for names in MIXES if not is_coupled(names)]
COUPLED = [names for names in MIXES if is_coupled(names)]


@pytest.mark.parametrize("group_rows", [WHOLE, SPANS], ids=["group", "stream"])
@pytest.mark.parametrize("names", ALONE, ids=lambda names: "+".join(names)[:40])
def test_pairwise(backend, names, group_rows):
    """Every type that is a function of a pair, its pairs in one group and streamed in spans."""
    # a launch a span: the interpreter needs a while for each
    P = 3 if backend == ("triton", "cpu") else 7
    head, pairs = make_batch(names, P, seed=len(names[0]))
    mix = {
        "loss_type": names,
        **OPTIONS,
        "loss_weights": [0.7 + 0.1 * i for i in range(len(names))],
    }
    compare(backend, head, pairs, strategy="pairwise", group_rows=group_rows, **mix)


@pytest.mark.parametrize("names", COUPLED, ids=lambda names: "+".join(names)[:40])
def test_coupled(backend, names):
    """Types that look at the whole batch score all log-probs first, and say so when forced."""
    head, pairs = make_batch(names, 4, seed=5)
    compare(backend, head, pairs, strategy="auto", loss_type=names, **OPTIONS)
    with pytest.raises(
        NotImplementedError, match="pairwise' cannot run this call: its loss couples"
    ):
        run(op, head, pairs, loss_type=names, **OPTIONS, strategy="pairwise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("strategy", "group_rows"),
    [
        ("pairwise", WHOLE),
        ("pairwise", SPANS),
        ("resident", None),
        ("recompute", None),
        ("auto", None),
    ],
    ids=str,
)
def test_strategies(backend, strategy, group_rows, dtype):
    """Every strategy and dtype, with a cap, a scale, LoRA on the head and token references."""
    names = ("ipo", "sft")
    head, pairs = make_batch(names, 4, dtype=dtype, seed=3, tokens=True, lora=True)
    mix = {"loss_type": names, "softcap": 9.0, "logit_scale": 0.7, "temperature": 1.3}
    compare(backend, head, pairs, strategy=strategy, group_rows=group_rows, **mix)


def test_groups(backend):
    """Several groups, some pairs streamed beside them: the gradients are those of one group."""
    head, pairs = make_batch(("sigmoid",), 6, seed=8)
    # one pair far longer than the others
    pairs["labels"][:, 3:] = -100
    pairs["labels"][2] = pairs["labels"][8] = torch.arange(13)
    # how the pairs are grouped does not depend on the type
    for names, sizes in ((("sigmoid", "cpo"), (40, 26, 20, 12, 5)), (("apo_zero",), (40, 12))):
        least = None
        for rows in sizes:
            with groups_of(rows):
                name, device = backend
                settings = {"loss_type": names, "strategy": "pairwise", "backend": name}
                found = run(op, head, pairs, device=device, **settings)
            least = found if least is None else least
            for name, value in found.items():
                torch.testing.assert_close(value, least[name], rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("budget", [None, SMALLEST], ids=["group", "least"])
def test_response_labels(backend, budget):
    """ORPO's NLL over prompt and chosen from the chosen rows, scored once."""
    names = ("orpo", "nll")
    head, pairs = make_batch(names, 4, seed=4, orpo=True)
    mix = {"loss_type": names, "loss_weights": (1.0, 0.6)}
    compare(backend, head, pairs, strategy="pairwise", budget_bytes=budget, **mix)
    compare(backend, head, pairs, strategy="recompute", **mix)


def test_ld_alpha(backend):
    """LD-DPO weighs the tokens beyond the shorter completion in a group as in all strategies."""
    head, pairs = make_batch(("sigmoid",), 4, seed=6, tokens=True)
    for strategy in ("pairwise", "recompute"):
        compare(backend, head, pairs, strategy=strategy, ld_alpha=0.3, beta=0.5)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_f_divergences(backend, divergence):
    """Other divergences in a streamed pair: the slopes of both sides are no longer opposite."""
    head, pairs = make_batch(("sigmoid",), 5, seed=10)
    pairs["ref_logps"] = pairs["ref_logps"] / 20
    mix = {"f_divergence_type": divergence, "loss_type": ("sigmoid", "sft"), "beta": 0.5}
    compare(backend, head, pairs, strategy="pairwise", group_rows=SPANS, **mix)


def test_more_pairs_than_a_program_holds(backend):
    """The answer of a batch type does not depend on the plan."""
    names = ("cpo", "sft")
    head, pairs = make_batch(names, 257, seed=2)
    pairs["labels"][:, 2:] = -100
    pairs["labels"][:, 0] = 3
    name, device = backend
    found = [
        run(op, head, pairs, device=device, loss_type=names, strategy=strategy, backend=name)
        for strategy in ("pairwise", "recompute")
    ]
    torch.testing.assert_close(found[0]["losses"], found[1]["losses"])


def test_dtype_of_outputs():
    """An fp64 reference leaves the outputs in the log-probs' fp32, whatever the plan."""
    head, pairs = make_batch(("sigmoid",), 3)
    pairs["ref_logps"] = pairs["ref_logps"].double()
    for strategy in ("pairwise", "recompute"):
        out = run(op, head, pairs, strategy=strategy)
        assert {out[name].dtype for name in ("loss", "losses", "chosen_rewards")} == {torch.float32}


def test_gradcheck():
    """The torch backend's pairwise gradient in fp64."""
    for names in (("sigmoid", "sft"), ("bco_pair", "rwr")):
        head, pairs = make_batch(names, 2, dtype=torch.float64, seed=1)
        head = {name: t[..., :6] if name != "bias" else t for name, t in head.items()}
        ours = run(op, head, pairs, loss_type=names, strategy="pairwise")
        wanted = run(reference, head, pairs, loss_type=names)
        for name, value in ours.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-10, atol=1e-12, msg=name)
