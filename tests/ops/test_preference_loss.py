"""``preference_loss``: values and gradients of every type against the fp64 reference."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spo_kernels import preference_loss
from spo_kernels.calls.loss_table import (
    F_DIVERGENCES,
    LOSS_TYPE_NAMES,
    LOSS_TYPES,
    loss_type_of,
)
from spo_kernels.reference.preference_loss import preference_loss_reference
from tests.helpers.preference_cases import BLOCK_P, MIXES, OPTIONS, compare, leaves_of, make_case

pair_counts = st.one_of(st.sampled_from([BLOCK_P - 1, BLOCK_P + 1]), st.integers(12, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", MIXES, ids=lambda names: "+".join(names)[:40])
@settings(max_examples=2)
# an empty batch never launches, and gives gradients of shape (0,)
@example(P=0, beta=0.1, form="sums", seed=0)
@given(
    P=pair_counts,
    beta=st.sampled_from([0.05, 0.1, 1.0]),
    form=st.sampled_from(["sums", "rows", "offsets"]),
    seed=st.integers(0, 99),
)
def test_forward_and_gradients(backend, dtype, names, P, beta, form, seed):
    """Every type and mixes of them, in every form, bare and with all extras, random upstream."""
    if form != "sums" and backend == ("triton", "cpu"):
        # a program a pair: the interpreter needs a while for each
        P = 16
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(P, generator=generator)
    weights = (0.5 + torch.rand(len(names), generator=generator)).tolist()
    mix = {"loss_type": names, "loss_weights": weights, "beta": beta, **OPTIONS}
    case = {"form": form, "dtype": dtype, "seed": seed}
    # fp16 gradients of a loss that grows like exp(m) must stay within its range; over a few pairs
    # of large sums the error of eager is luck, and half of it no measure
    case["scale"] = 60.0 if form == "sums" and dtype != torch.float16 else 6.0
    tensors, inputs = make_case(names, P, **case, extras=True)
    compare(backend, tensors, upstream, **inputs, **mix)
    tensors, inputs = make_case(names, P, **case)
    without_reference = {n: t for n, t in tensors.items() if not n.startswith("ref")}
    compare(backend, without_reference, upstream, **inputs, **mix)


@pytest.mark.parametrize("divergence", list(F_DIVERGENCES))
def test_f_divergences(backend, divergence):
    """The four divergences, in every type that has them and on token log-probs."""
    names = tuple(row.name for row in LOSS_TYPES if row.divergence)
    P = 5
    upstream = torch.randn(P, generator=torch.Generator().manual_seed(1))
    for form in ("sums", "rows"):
        tensors, inputs = make_case(names, P, form=form, seed=3, extras=True, scale=6.0)
        for coef in (0.5, 1.0, 2.0):
            mix = {"loss_type": names, **OPTIONS, "f_alpha_divergence_coef": coef}
            compare(backend, tensors, upstream, f_divergence_type=divergence, **inputs, **mix)
            if divergence != "alpha_divergence":
                break


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "alphapo", "alphapo_alpha": 0.0},
        {"loss_type": "alphapo", "alphapo_alpha": -0.5},
        {"loss_type": "ada_dpo", "ada_rho": 0.9, "beta": 1.0},
        {"loss_type": "ada_dpo", "ada_tau_max": math.inf, "beta": 1.0},
        {"loss_type": "ada_dpo_quadratic", "ada_rho": 1e-3, "ada_tau_max": math.inf, "beta": 1.0},
        {"loss_type": "dual_clip", "clip_chosen": 0.3, "clip_rejected": 0.2},
        {"loss_type": "rwr", "rwr_temperature": 0.3, "rwr_max_weight": 2.0},
        {"loss_type": "discopop", "discopop_tau": 2.0},
        {"loss_type": "simpo", "simpo_gamma": 0.0, "beta": 2.5},
    ],
    ids=str,
)
def test_parameters(backend, settings):
    """Settings at the ends of their ranges."""
    tensors, inputs = make_case((settings["loss_type"],), 20, seed=5)
    upstream = torch.randn(20, generator=torch.Generator().manual_seed(2))
    compare(backend, tensors, upstream, **inputs, **settings)


# the pair of the numbers below: log-probs -2 and -7, and what some types read beside them
PAIR = {"chosen_logps": [-2.0], "rejected_logps": [-7.0]}
PAIR_COUNTS = {"chosen_lengths": [4], "rejected_lengths": [2]}
PAIR_REWARDS = {"reward_chosen": [0.0], "reward_rejected": [1.0]}
RESPONSE = {"response_logps": [-3.0], "ref_response_logps": [-1.0]}
RESPONSE_COUNTS = {"response_lengths": [6]}


def sp(t):
    return math.log1p(math.exp(t))


def s(t):
    return 1 / (1 + math.exp(-t))


def odds(t):
    return t - math.log(1 - math.exp(t))


# beta 0.1, so m = 0.5, beta c = -0.2, beta r = -0.7; label smoothing 0.1
BY_HAND = {
    "sigmoid": sp(-0.5),
    "hinge": 0.5,
    # -2 / 4 + 7 / 2 - 1 / 0.2
    "ipo": 2.0**2,
    "exo_pair": s(0.5) * math.log(s(0.5) / 0.9) + s(-0.5) * math.log(s(-0.5) / 0.1),
    "nca_pair": sp(0.2) + 0.5 * sp(-0.2) + 0.5 * sp(-0.7),
    "robust": (0.9 * sp(-0.5) - 0.1 * sp(0.5)) / 0.8,
    "bco_pair": sp(0.2) + sp(-0.7),
    # (-2 - 5)^2 + (-7 + 5)^2
    "sppo_hard": 53.0,
    "aot": 0.9 * sp(-0.5) + 0.1 * sp(0.5),
    "aot_unpaired": 0.9 * sp(-0.5) + 0.1 * sp(0.5),
    "apo_zero": s(0.2) + s(-0.7),
    "apo_down": s(-0.2) + s(-0.5),
    "discopop": s(-10) * sp(-0.5) + s(10) * math.exp(-0.5),
    # 0.1 (-2 / 4 + 7 / 2)
    "sigmoid_norm": sp(-0.3),
    "cpo": 0.9 * sp(-0.5) + 0.1 * sp(0.5),
    "cell": 0.5 * math.exp(-0.5) + 0.5 * sp(-0.5),
    "padll": 0.9 * sp(-0.5),
    "pfl": 0.5 * sp(-0.5),
    # one pair is its own mean: u = 10
    "aql": s(0.5 + 0.01 * (s(10) - 0.5) - 10) * sp(-0.5) + s(9.5 - 0.01 * (s(10) - 0.5)) * 0.5,
    "aqfl": s(0.1 * (10 - 0.05 * s(10))) * sp(-0.5) + s(-0.1 * (10 - 0.05 * s(10))) * 0.5,
    "dbaql": 0.5 * sp(-0.5 / 0.9) + 0.5 * math.exp(-0.45),
    # tau = 0.5 / 0.943443 = 0.529974
    "ada_dpo": 0.529974 * sp(-0.5 / 0.529974) + (0.1 - math.log(2)) * 0.529974,
    "dual_clip": sp(-0.5),
    # both lengths are of one pair: the mean over its tokens
    "sft": 0.5,
    "rpo": 2.0,
    "rpo_mean": 0.5,
    # z = 0.1 (-0.5 + 3.5) - 0.5
    "simpo": 0.9 * sp(0.2) + 0.1 * sp(-0.2),
    "orpo": 0.1 * sp(odds(-3.5) - odds(-0.5)),
    # rewards 0 and 1: (2 + 7 e) / 6
    "rwr": (2 + 7 * math.e) / 6,
    # response 3, reference 1, 6 tokens
    "selm": -0.2,
    "nll": 0.5,
}
g_c, g_r = ((1 - math.exp(-0.25 * t)) / 0.25 for t in (-0.5, -3.5))
z = 0.1 * (g_c - g_r) - 0.5
BY_HAND["alphapo"] = 0.9 * sp(-z) + 0.1 * sp(z)
taus = [0.1 + i * 1e-5 for i in range(390_000)]
BY_HAND["ada_dpo_quadratic"] = min(t * (sp(-0.5 / t) + 0.1 * t - math.log(2)) for t in taus)


def test_every_type_has_a_value_by_hand():
    assert set(BY_HAND) == set(LOSS_TYPE_NAMES)


@pytest.mark.parametrize("name", LOSS_TYPE_NAMES)
def test_by_hand(backend, name):
    """The oracle and the op have the value computed by hand."""
    floats, counts = PAIR | PAIR_REWARDS, dict(PAIR_COUNTS)
    if "response" in loss_type_of(name).inputs:
        floats, counts = floats | RESPONSE, counts | RESPONSE_COUNTS
    settings = {"loss_type": name, **OPTIONS}

    def given(dtype, device):
        wide = {n: torch.tensor(t, dtype=dtype, device=device) for n, t in floats.items()}
        return wide | {n: torch.tensor(value, device=device) for n, value in counts.items()}

    out = preference_loss_reference(**given(torch.float64, "cpu"), **settings)
    assert out["losses"].item() == pytest.approx(BY_HAND[name], rel=2e-6)
    out = preference_loss(**given(torch.float32, backend[1]), **settings, backend=backend[0])
    assert out.losses.item() == pytest.approx(BY_HAND[name], rel=2e-6)


def test_docstring_holds_the_table():
    doc = " ".join(preference_loss.__doc__.split())
    for row in LOSS_TYPES:
        assert f"{row.name}: {row.formula}" in doc


@pytest.mark.parametrize("form", ["sums", "rows", "offsets"])
@pytest.mark.parametrize("names", MIXES, ids=lambda names: "+".join(names)[:40])
def test_gradcheck(form, names):
    """The torch backend and the reference have each other's value and derivative, in fp64."""
    tensors, inputs = make_case(names, 4, form=form, dtype=torch.float64, seed=7, extras=True)
    # WPO's weights depend on the log-probs, but have no gradient
    weighed = inputs
    inputs = {name: value for name, value in inputs.items() if "sum_sq" not in name}
    leaves = leaves_of(tensors)
    mine = [name for name, leaf in leaves.items() if leaf.requires_grad]
    values = []
    for call in (preference_loss_reference, preference_loss):

        def losses(*args, call=call, inputs=inputs):
            given = {**leaves, **dict(zip(mine, args, strict=True))}
            out = call(**given, **inputs, loss_type=names, **OPTIONS)
            return out["losses"] if isinstance(out, dict) else out.losses

        policy = [leaves[name] for name in mine]
        # one random direction through every element instead of one evaluation for each
        assert torch.autograd.gradcheck(losses, policy, fast_mode=True), call
        values.append(losses(*policy, inputs=weighed).detach())
    # an oracle with a constant in fp32 would be no oracle
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-11)
