"""``preference_loss``: the numbers of the papers, and formulas computed by hand, to 6 digits."""

import math

import pytest
import torch

from spo_kernels import preference_loss
from spo_kernels.calls.loss_table import ada_inverse_root
from spo_kernels.reference.preference_loss import preference_loss_reference


def losses_and_slopes(backend, margins, **settings):
    """Return the losses of pairs with these margins at beta 1, and their slopes."""
    name, device = backend
    chosen = torch.tensor(margins, device=device, requires_grad=True)
    settings = {"beta": 1.0, "backend": name, **settings}
    out = preference_loss(chosen, torch.zeros_like(chosen), **settings)
    out.losses.sum().backward()
    return out.losses.tolist(), chosen.grad.tolist()


def test_published_vectors(backend):
    """DiscoPOP to 6 digits, with the slope that is positive at a margin of 0."""
    margins = [-2.0, -0.3, 0.0, 0.05, 0.3, 2.0]
    losses, slopes = losses_and_slopes(backend, margins, loss_type="discopop")
    values = [2.126928, 0.855580, 0.846574, 0.875181, 0.740357, 0.135335]
    assert losses == pytest.approx(values, abs=1e-6, rel=0)
    values = [-0.880797, -0.551917, 0.784264, 0.285404, -0.730840, -0.135335]
    assert slopes == pytest.approx(values, abs=2e-6, rel=0)


# rho -> u of H(s(u)) = log 2 - rho, s(-u)
ADA_ROOTS = {
    0.05: (0.64898, 0.343218),
    0.1: (0.94344, 0.280205),
    0.3: (1.86962, 0.133586),
    0.5: (2.98324, 0.048189),
}
# rho -> losses and slopes at -6, -0.8, 0.05, 0.8, 6, from a search over the temperature
ADA_QUADRATIC = {
    0.1: (
        [5.097805, 0.557559, -0.020981, -0.242441, -0.902195],
        [-0.934531, -0.758201, -0.393111, -0.241799, -0.065469],
    ),
    0.5: (
        [5.759893, 0.652269, -0.016907, -0.147731, -0.240107],
        [-0.999830, -0.899016, -0.377541, -0.100984, -0.000170],
    ),
}


def test_ada_dpo_vectors(backend):
    """Its roots, constant slopes between the bounds, the bounds, and the definition, to 6 digits.

    The argmin itself: the authors' five Newton steps are up to 0.43 away from it in temperature.
    """

    def sp(t):
        return math.log1p(math.exp(t))

    for rho, (root, slope) in ADA_ROOTS.items():
        assert 1.0 / ada_inverse_root(rho) == pytest.approx(root, abs=6e-6, rel=0)
        settings = {"loss_type": "ada_dpo", "ada_rho": rho, "ada_tau_max": 5.0}
        margins = [0.3, 1.0, 3.0]
        losses, slopes = losses_and_slopes(backend, margins, **settings)
        assert slopes == pytest.approx([-slope] * 3, abs=1e-6, rel=0)
        values = [m / root * (sp(-root) + rho - math.log(2)) for m in margins]
        assert losses == pytest.approx(values, abs=1e-6, rel=1e-6)
        negative, slopes = losses_and_slopes(backend, [-m for m in margins], **settings)
        assert slopes == pytest.approx([slope - 1] * 3, abs=1e-6, rel=0)
        values = [loss + m for loss, m in zip(losses, margins, strict=True)]
        assert negative == pytest.approx(values, abs=1e-6, rel=1e-6)
        # at the smallest and the largest temperature: -s(-0.1), -s(-4)
        losses, slopes = losses_and_slopes(backend, [0.01, 20.0], **settings)
        assert slopes == pytest.approx([-0.475021, -0.017986], abs=1e-6, rel=0)
        values = [t * (sp(-m / t) + rho - math.log(2)) for t, m in ((0.1, 0.01), (5.0, 20.0))]
        assert losses == pytest.approx(values, abs=1e-6, rel=1e-6)
        # the definition: no temperature of a fine grid does better
        loss = losses_and_slopes(backend, [1.0], **settings)[0]
        grid = (0.1 + i * 4.9 / 4000 for i in range(4001))
        best = min(t * (sp(-1 / t) + rho - math.log(2)) for t in grid)
        assert loss == [pytest.approx(best, abs=1e-6)]
    # no root from log 2 on: -s(-2 / 0.1) and -s(0.2 / 0.1)
    _, slopes = losses_and_slopes(backend, [2.0, -0.2], loss_type="ada_dpo", ada_rho=0.7)
    assert slopes == pytest.approx([0.0, -0.880797], abs=1e-6, rel=0)
    for rho, (values, expected) in ADA_QUADRATIC.items():
        margins = [-6.0, -0.8, 0.05, 0.8, 6.0]
        settings = {"loss_type": "ada_dpo_quadratic", "ada_rho": rho}
        losses, slopes = losses_and_slopes(backend, margins, **settings)
        assert losses == pytest.approx(values, abs=1e-6, rel=1e-6)
        assert slopes == pytest.approx(expected, abs=1e-6, rel=0)


@pytest.mark.parametrize(
    ("names", "weights", "beta", "losses", "slopes", "slope_x"),
    [
        # RPO: sp(-x) - eta beta pc, eta 0.005: sp(-0.04) + 6e-4, sp(0.09) + 1.5e-3
        (
            ["sigmoid", "rpo"],
            [1.0, 0.005 * 0.01],
            0.01,
            [0.673947, 0.740659],
            [-0.00495001, -0.00527485],
            0.0,
        ),
        # its average form, a mean of each response's mean: sp(-2) + 0.2 * 3, sp(4.5) + 0.2 * 1.5
        (
            ["sigmoid", "rpo_mean"],
            [1.0, 0.2],
            0.5,
            [0.726928, 4.811048],
            [-0.1096015, -0.5045065],
            0.0,
        ),
        # SELM: sp(-x) + alpha beta (px - ref_x), alpha 0.001: sp(-0.04) + 4e-4, sp(0.09) - 2.5e-4
        (
            ["sigmoid", "selm"],
            [1.0, 0.001],
            0.01,
            [0.673747, 0.738909],
            [-0.00490001, -0.00522485],
            1e-5,
        ),
    ],
    ids=["rpo", "rpo_mean", "selm"],
)
def test_recipes_by_hand(backend, names, weights, beta, losses, slopes, slope_x):
    """RPO's two forms and SELM as published, with their authors' settings."""
    name, device = backend

    def tensor(*values):
        return torch.tensor(values, device=device)

    # scores 2 and -5 against -2 and 4: x = 4 beta, -9 beta
    chosen = tensor(-12.0, -30.0).requires_grad_()
    response = tensor(-9.0, -40.0).requires_grad_()
    given = {"chosen_lengths": tensor(4, 20), "rejected_lengths": tensor(7, 7)}
    if "selm" in names:
        # scores 40 and -25
        given |= {"response_logps": response, "ref_response_logps": tensor(-49.0, -15.0)}
    out = preference_loss(
        chosen,
        tensor(-15.0, -20.0),
        tensor(-14.0, -25.0),
        tensor(-13.0, -24.0),
        loss_type=names,
        loss_weights=weights,
        beta=beta,
        backend=name,
        **given,
    )
    out.losses.sum().backward()
    assert out.losses.tolist() == pytest.approx(losses, abs=1e-6, rel=0)
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=2e-6)
    if slope_x:
        assert response.grad.tolist() == pytest.approx([slope_x] * 2, rel=1e-6)
    if "rpo_mean" in names:
        # TRL's sft is another number: 42 over 24 tokens, where 3 and 1.5 average to 2.25
        for loss_type, mean in (("rpo_mean", 2.25), ("sft", 1.75)):
            out = preference_loss(
                chosen, chosen.detach(), loss_type=loss_type, backend=name, **given
            )
            assert out.losses.mean().item() == pytest.approx(mean, rel=1e-6)


def test_discovered_siblings_by_hand(backend):
    """DiscoPOP's siblings on either side of their switches, with a statistic of two pairs."""
    name, device = backend

    def sp(t):
        return math.log1p(math.exp(t))

    def s(t):
        return 1 / (1 + math.exp(-t))

    # margins of 1/32 and -1/16; the policy prefers chosen in the second alone
    given = {
        "chosen_logps": [-5.0, -4.0],
        "rejected_logps": [-4.0, -5.0],
        "ref_chosen_logps": [-5.03125, -3.9375],
        "ref_rejected_logps": [-4.0, -5.0],
    }
    margins = [0.03125, -0.0625]
    # over 0.05, with their mean, and their variance over one less than two
    u, mean, variance = [0.625, -1.25], -0.3125, 2 * 0.9375**2
    threshold = 0.5 + 0.01 * (s(mean) - 0.5)
    quantile = math.sqrt(variance) * (s(-0.625) + s(1.25)) / 2
    quantile += 0.05 * (s(mean) - quantile)
    aql, aqfl = [s(threshold - t) for t in u], [s(0.1 * abs(t - quantile)) for t in u]
    q = s(variance)
    by_hand = {
        "cell": [0.5 * math.exp(-m) + 0.5 * sp(-m) for m in margins],
        "padll": [0.9 * sp(-0.03125), 0.45 * sp(0.0625)],
        "pfl": [2 * (1 - 0.03125), 0.5 * sp(0.0625)],
        "aql": [w * sp(-m) + (1 - w) * (1 - m) for w, m in zip(aql, margins, strict=True)],
        "aqfl": [w * sp(-m) + (1 - w) * (1 - m) for w, m in zip(aqfl, margins, strict=True)],
        "dbaql": [q * sp(-m / 0.9) + (1 - q) * math.exp(-0.9 * m) for m in margins],
    }
    for loss_type, values in by_hand.items():
        settings = {"loss_type": loss_type, "beta": 1.0}
        wide = {n: torch.tensor(t, dtype=torch.float64) for n, t in given.items()}
        out = preference_loss_reference(**wide, **settings)
        assert out["losses"].tolist() == pytest.approx(values, rel=1e-12), loss_type
        here = {n: torch.tensor(t, device=device) for n, t in given.items()}
        out = preference_loss(**here, **settings, backend=name)
        assert out.losses.tolist() == pytest.approx(values, rel=2e-6), loss_type
