"""The one table of loss types: name, kind, parameters with their ranges, formula and paper.

Symbols of the formulas: ``c`` and ``r`` are the scores of the chosen and the rejected side of a
pair, policy log-prob minus reference log-prob, with ``m = beta (c - r)``; ``pc`` and ``pr`` the
policy's log-probs alone; ``len_c`` and ``len_r`` the completion lengths in tokens, at least 1;
``x``, ``px`` and ``len_x`` the same of a third response; ``sp(t) = log(1 + exp(t))``,
``s(t) = 1 / (1 + exp(-t))``; ``mean``, ``std``, ``var`` and ``sort`` run over the batch of P pairs.
Unpaired rows: ``d`` is the score of one response. Lists of K: ``y_j = beta * score_j``, ``psi_j``
the label of response j.

A type is five edits: its row here; a function of the row's name in ``kernels/``, in
``torch_backend/`` and in ``reference/``, each derived on its own; a value computed by hand in
``tests/ops/test_<op>.py``. Pairwise types are in the files ``preference_terms.py`` of the backends.
"""

import dataclasses
import math
import textwrap
from collections import namedtuple
from typing import Literal

_INF = math.inf


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A Python number between ``low`` and ``high``; ``closed`` says which ends belong to it."""

    name: str
    default: float
    low: float
    high: float
    meaning: str
    closed: str = ""

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies in the range; NaN never does."""
        above = value >= self.low if "low" in self.closed else value > self.low
        below = value <= self.high if "high" in self.closed else value < self.high
        return above and below

    @property
    def requirement(self) -> str:
        """The range in words, for an error and for the docs."""
        low, high = f"{self.low:g}", f"{self.high:g}"
        if math.isinf(self.low):
            return "be a finite float" if math.isinf(self.high) else f"be below {high}"
        sign = ">=" if "low" in self.closed else ">"
        if math.isinf(self.high):
            return f"be a {'' if 'high' in self.closed else 'finite '}float {sign} {low}"
        start, end = ("[" if sign == ">=" else "("), ("]" if "high" in self.closed else ")")
        return f"be between {low} and {high}, {start}{low}, {high}{end}"


@dataclasses.dataclass(frozen=True)
class LossType:
    """One loss; every backend and the reference have a function of its name.

    Attributes:
        kind: what a pairwise type is a function of, which decides what its functions return and
            where its gradient goes: "pair", the scores of both sides; "ranked", the sorted scores,
            so that a weight of a pair has no meaning; "statistic", the scores and one statistic of
            all margins; "policy", the policy's log-probs alone; "response", the third response.
        parameters: names of its family's parameters in the formula.
        inputs: needed beside log-probs: "lengths", "response", "response_lengths",
            "rewards".
        positive: parameters that must be > 0 here though their range holds 0.
        mean_over: the responses whose tokens in the whole batch it is a mean over: 0 chosen,
            1 rejected, 2 the third one.
        divergence: it may be combined with an f-divergence (arXiv:2309.16240): it is a function of
            ``c - r``, or of no score at all.
        peers: other libraries that have it: "TRL" 1.16, "Liger" 0.8.5.
    """

    name: str
    formula: str
    paper: str
    kind: Literal["pair", "ranked", "statistic", "policy", "response"] = "pair"
    parameters: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    mean_over: tuple[int, ...] = ()
    divergence: bool = False
    peers: tuple[str, ...] = ()

    @property
    def couples_pairs(self) -> bool:
        """Whether the gradient of one pair depends on the upstream gradients of the others."""
        return self.kind in ("ranked", "statistic")

    @property
    def of_margin(self) -> bool:
        """Whether it is a function of m alone: the slopes of both sides are opposite."""
        return self.kind == "pair" and self.divergence and not self.inputs

    @property
    def batch(self) -> bool:
        """Whether its value for one pair depends on the other pairs of the call."""
        return self.couples_pairs or bool(self.mean_over)


PARAMETERS = (
    Parameter("beta", 0.1, 0.0, _INF, "inverse temperature of the margin"),
    Parameter("label_smoothing", 0.0, 0.0, 0.5, "chance that a label is flipped", closed="low"),
    Parameter("discopop_tau", 0.05, 0.0, _INF, "temperature of DiscoPOP's blend"),
    Parameter("simpo_gamma", 0.5, 0.0, _INF, "target margin of SimPO and TPO-L", closed="low"),
    Parameter("alphapo_alpha", 0.0, -_INF, _INF, "bend of AlphaPO's reward; 0 is SimPO's"),
    Parameter("ada_rho", 0.1, 0.0, _INF, "Ada-DPO's price of a larger temperature"),
    Parameter("ada_tau_min", 0.1, 0.0, _INF, "smallest temperature of a pair"),
    Parameter("ada_tau_max", 4.0, 0.0, _INF, "largest temperature of a pair", closed="high"),
    Parameter("clip_chosen", 5.0, 0.0, _INF, "dual clip: reward above which chosen is left alone"),
    Parameter("clip_rejected", 5.0, 0.0, _INF, "dual clip: the same below minus it for rejected"),
    Parameter("rwr_temperature", 1.0, 0.0, _INF, "temperature of the reward weights"),
    Parameter("rwr_max_weight", _INF, 0.0, _INF, "largest reward weight", closed="high"),
    Parameter("min_reward_margin", 0.0, 0.0, _INF, "pairs nearer than this count 0", closed="low"),
)

# one value of every parameter, as backends take them; the last one is derived from ada_rho
Parameters = namedtuple("Parameters", [*(row.name for row in PARAMETERS), "ada_inverse_root"])

# a batch type's kernel holds all pairs of a call in one program
MAX_BATCH_PAIRS = 256

_TRL, _BOTH = ("TRL",), ("TRL", "Liger")
_DISCOPOP = "Lu et al. 2024, arXiv:2406.08414"
_ADA = "Hong et al. 2024, arXiv:2406.02764"

LOSS_TYPES = (
    LossType(
        name="sigmoid",
        formula="sp(-m)",
        paper="Rafailov et al. 2023, arXiv:2305.18290, Eq. 7",
        parameters=("beta",),
        divergence=True,
        peers=_BOTH,
    ),
    LossType(
        name="hinge",
        formula="max(0, 1 - m)",
        paper="Zhao et al. 2023, arXiv:2305.10425, with the margin of arXiv:2309.06657",
        parameters=("beta",),
        divergence=True,
        peers=_BOTH,
    ),
    LossType(
        name="ipo",
        formula="(c / len_c - r / len_r - 1 / (2 beta))^2",
        paper="Azar et al. 2023, arXiv:2310.12036, Eq. 17, on per-token scores as in TRL",
        parameters=("beta",),
        inputs=("lengths",),
        divergence=True,
        peers=_TRL,
    ),
    LossType(
        name="exo_pair",
        formula="s(m) (log s(m) - log(1 - eps)) + s(-m) (log s(-m) - log(eps)), "
        "eps = label_smoothing",
        paper="Ji et al. 2024, arXiv:2402.00856, Eq. 16",
        parameters=("beta", "label_smoothing"),
        positive=("label_smoothing",),
        divergence=True,
        peers=_BOTH,
    ),
    LossType(
        name="nca_pair",
        formula="sp(-beta c) + sp(beta c) / 2 + sp(beta r) / 2",
        paper="Chen et al. 2024, arXiv:2402.05369",
        parameters=("beta",),
        peers=_BOTH,
    ),
    LossType(
        name="robust",
        formula="((1 - eps) sp(-m) - eps sp(m)) / (1 - 2 eps), eps = label_smoothing",
        paper="Chowdhury et al. 2024, arXiv:2403.00409",
        parameters=("beta", "label_smoothing"),
        divergence=True,
        peers=_BOTH,
    ),
    LossType(
        name="bco_pair",
        formula="sp(-beta c) + sp(beta r)",
        paper="Jung et al. 2024, arXiv:2404.04656, without its running reward shift, as in TRL",
        parameters=("beta",),
        peers=_BOTH,
    ),
    LossType(
        name="sppo_hard",
        formula="(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2",
        paper="Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with win rates 1 and 0",
        parameters=("beta",),
        peers=_BOTH,
    ),
    LossType(
        name="aot",
        kind="ranked",
        formula="(1 - eps) sp(-beta u) + eps sp(beta u), "
        "u_k = sort(pc - pr)_k - sort(ref_c - ref_r)_k, eps = label_smoothing",
        paper="Melnyk et al. 2024, arXiv:2406.05882, paired; losses[k] is of rank k",
        parameters=("beta", "label_smoothing"),
        peers=_TRL,
    ),
    LossType(
        name="aot_unpaired",
        kind="ranked",
        formula="(1 - eps) sp(-beta u) + eps sp(beta u), u_k = sort(c)_k - sort(r)_k, "
        "eps = label_smoothing",
        paper="Melnyk et al. 2024, arXiv:2406.05882, unpaired; losses[k] is of rank k",
        parameters=("beta", "label_smoothing"),
        peers=_TRL,
    ),
    LossType(
        name="apo_zero",
        formula="s(-beta c) + s(beta r)",
        paper="D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7",
        parameters=("beta",),
        peers=_BOTH,
    ),
    LossType(
        name="apo_down",
        formula="s(beta c) + s(-m)",
        paper="D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8",
        parameters=("beta",),
        peers=_BOTH,
    ),
    LossType(
        name="discopop",
        formula="(1 - q) sp(-m) + q exp(-m), q = s(m / discopop_tau)",
        paper=f"{_DISCOPOP}, Eq. 5 (there LRML)",
        parameters=("beta", "discopop_tau"),
        divergence=True,
        peers=_BOTH,
    ),
    LossType(
        name="sigmoid_norm",
        formula="sp(-beta (c / len_c - r / len_r))",
        paper="Lambert et al. 2024, arXiv:2411.15124 (length-normalised DPO)",
        parameters=("beta",),
        inputs=("lengths",),
        divergence=True,
        peers=_BOTH,
    ),
    LossType(
        name="cpo",
        formula="(1 - eps) sp(-m) + eps sp(m), eps = label_smoothing",
        paper="Xu et al. 2024, arXiv:2401.08417, without a reference; with one it is "
        "conservative DPO. TRL's `sigmoid` of CPO and TPO",
        parameters=("beta", "label_smoothing"),
        divergence=True,
        peers=_BOTH,
    ),
    LossType(
        name="cell",
        formula="exp(-m) / 2 + sp(-m) / 2",
        paper=f"{_DISCOPOP}, discovered sibling",
        parameters=("beta",),
        divergence=True,
    ),
    LossType(
        name="padll",
        formula="0.9 sp(-m), halved where m < 0",
        paper=f"{_DISCOPOP}, discovered sibling",
        parameters=("beta",),
        divergence=True,
    ),
    LossType(
        name="pfl",
        formula="sp(-m) / 2 where pc > pr, 2 max(0, 1 - m) elsewhere",
        paper=f"{_DISCOPOP}, discovered sibling",
        parameters=("beta",),
    ),
    LossType(
        name="aql",
        kind="statistic",
        formula="q sp(-m) + (1 - q) max(0, 1 - m), q = s(M - u), u = m / 0.05, "
        "M = 0.5 + 0.01 (s(mean(u)) - 0.5)",
        paper=f"{_DISCOPOP}, discovered sibling",
        parameters=("beta",),
    ),
    LossType(
        name="aqfl",
        kind="statistic",
        formula="q sp(-m) + (1 - q) max(0, 1 - m), q = s(0.1 |u - Q|), u = m / 0.05, "
        "Q = 0.95 std(u) mean(s(-u)) + 0.05 s(mean(u))",
        paper=f"{_DISCOPOP}, discovered sibling; the deviation of a single pair counts 0",
        parameters=("beta",),
    ),
    LossType(
        name="dbaql",
        kind="statistic",
        formula="q sp(-m / 0.9) + (1 - q) exp(-0.9 m), q = s(var(m / 0.05))",
        paper=f"{_DISCOPOP}, discovered sibling; the variance of a single pair counts 0",
        parameters=("beta",),
    ),
    LossType(
        name="ada_dpo",
        formula="min over t in [ada_tau_min, ada_tau_max] of t sp(-m / t) + (ada_rho - log 2) t",
        paper=f"{_ADA}, Eq. 6, its argmin in closed form instead of the authors' Newton steps",
        parameters=("beta", "ada_rho", "ada_tau_min", "ada_tau_max"),
        divergence=True,
    ),
    LossType(
        name="ada_dpo_quadratic",
        formula="min over t in [ada_tau_min, ada_tau_max] of t sp(-m / t) + ada_rho t^2 - t log 2",
        paper=f"{_ADA}, Eq. 12, its argmin instead of the authors' Newton steps",
        parameters=("beta", "ada_rho", "ada_tau_min", "ada_tau_max"),
        divergence=True,
    ),
    LossType(
        name="dual_clip",
        formula="sp(max(beta r, -clip_rejected) - min(beta c, clip_chosen))",
        paper="ours; TSO (arXiv:2409.02118) names a dual clip without a formula we could find",
        parameters=("beta", "clip_chosen", "clip_rejected"),
    ),
    LossType(
        name="sft",
        kind="policy",
        formula="-pc P / sum(len_c)",
        paper="the chosen tokens' mean negative log-prob over the batch, as in TRL's DPO and CPO",
        inputs=("lengths",),
        mean_over=(0,),
        divergence=True,
        peers=_BOTH,
    ),
    LossType(
        name="rpo",
        kind="policy",
        formula="-pc",
        paper="Liu et al. 2024, arXiv:2405.16436, main text: beside sigmoid with weight eta beta",
        divergence=True,
    ),
    LossType(
        name="rpo_mean",
        kind="policy",
        formula="-pc / len_c",
        paper="Liu et al. 2024, arXiv:2405.16436, App. F: beside sigmoid with a weight of its own",
        inputs=("lengths",),
        divergence=True,
    ),
    LossType(
        name="simpo",
        kind="policy",
        formula="(1 - eps) sp(-z) + eps sp(z), z = beta (pc / len_c - pr / len_r) - simpo_gamma, "
        "eps = label_smoothing",
        paper="Meng et al. 2024, arXiv:2405.14734, Eq. 6; TPO-L of arXiv:2405.16681",
        parameters=("beta", "simpo_gamma", "label_smoothing"),
        inputs=("lengths",),
        divergence=True,
        peers=_BOTH,
    ),
    LossType(
        name="alphapo",
        kind="policy",
        formula="(1 - eps) sp(-z) + eps sp(z), z = beta (g(pc / len_c) - g(pr / len_r)) - "
        "simpo_gamma, g(t) = (1 - exp(-alphapo_alpha t)) / alphapo_alpha, eps = label_smoothing",
        paper="Gupta et al. 2025, arXiv:2501.03884; exponents above 80 count as 80",
        parameters=("beta", "simpo_gamma", "alphapo_alpha", "label_smoothing"),
        inputs=("lengths",),
        divergence=True,
        peers=_TRL,
    ),
    LossType(
        name="orpo",
        kind="policy",
        formula="beta sp(o(pr / len_r) - o(pc / len_c)), o(t) = t - log(1 - exp(t))",
        paper="Hong et al. 2024, arXiv:2403.07691, Eq. 7; t above -1e-7 counts as -1e-7",
        parameters=("beta",),
        inputs=("lengths",),
        divergence=True,
        peers=_BOTH,
    ),
    LossType(
        name="rwr",
        kind="policy",
        formula="-(w(reward_c) pc + w(reward_r) pr) P / sum(len_c + len_r), "
        "w(t) = min(exp(t / rwr_temperature), rwr_max_weight)",
        paper="Tajwar et al. 2024, arXiv:2404.14367: reward-weighted regression",
        parameters=("rwr_temperature", "rwr_max_weight"),
        inputs=("lengths", "rewards"),
        mean_over=(0, 1),
        divergence=True,
    ),
    LossType(
        name="selm",
        kind="response",
        formula="beta x",
        paper="Zhang et al. 2024, arXiv:2405.19332: beside sigmoid with weight alpha",
        parameters=("beta",),
        inputs=("response",),
    ),
    LossType(
        name="nll",
        kind="response",
        formula="-px P / sum(len_x)",
        paper="the third response's mean negative log-prob over the batch: ORPO's prompt and "
        "chosen (arXiv:2403.07691), TPO's gold response (arXiv:2405.16681)",
        inputs=("response", "response_lengths"),
        mean_over=(2,),
        divergence=True,
        peers=_BOTH,
    ),
)

LOSS_TYPE_NAMES = tuple(row.name for row in LOSS_TYPES)

# f'(t) of t = policy / reference, in place of the score of a type with divergence=True
F_DIVERGENCES = {
    "reverse_kl": "c",
    "forward_kl": "1 - exp(-c)",
    "js_divergence": "log 2 - sp(-c)",
    "alpha_divergence": "(exp((a - 1) c) - 1) / (a - 1), a = f_alpha_divergence_coef; c at a = 1",
}

UNPAIRED_PARAMETERS = (
    Parameter("beta", 0.1, 0.0, _INF, "inverse temperature of the score"),
    Parameter("desirable_weight", 1.0, 0.0, _INF, "weight of desirable responses", closed="low"),
    Parameter("undesirable_weight", 1.0, 0.0, _INF, "weight of undesirable ones", closed="low"),
)
UnpairedParameters = namedtuple("UnpairedParameters", [row.name for row in UNPAIRED_PARAMETERS])

UNPAIRED_LOSS_TYPES = (
    LossType(
        name="kto",
        formula="s(beta (z - d)) if desirable, else s(beta (d - z)), "
        "z = max(0, mean(kl_logps - ref_kl_logps)), no gradient through z",
        paper="Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7",
        parameters=("beta", "desirable_weight", "undesirable_weight"),
        peers=_BOTH,
    ),
    LossType(
        name="apo_zero_unpaired",
        formula="s(-beta d) if desirable, else s(beta d)",
        paper="D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7, unpaired",
        parameters=("beta", "desirable_weight", "undesirable_weight"),
        peers=_TRL,
    ),
    LossType(
        name="bco",
        formula="sp(-(beta d - reward_shift)) if desirable, else sp(beta d - reward_shift), no "
        "gradient through reward_shift",
        paper="Jung et al. 2024, arXiv:2404.04656, without its density-ratio weights",
        parameters=("beta", "desirable_weight", "undesirable_weight"),
    ),
)

LISTWISE_PARAMETERS = (
    Parameter("beta", 0.1, 0.0, _INF, "inverse temperature of the scores"),
    Parameter("ndcg_temperature", 1.0, 0.0, _INF, "temperature of NeuralSort"),
    Parameter("ndcg_alpha", 25.0, 0.0, _INF, "steepness of ApproxNDCG's ranks"),
)
ListwiseParameters = namedtuple("ListwiseParameters", [row.name for row in LISTWISE_PARAMETERS])

LISTWISE_LOSS_TYPES = (
    LossType(
        name="neural_ndcg",
        formula="-sum_j disc(j) (Q g)_j / IDCG, Q = Sinkhorn of NeuralSort, "
        "P_ji = softmax_i(((K + 1 - 2 j) y_i - sum_l |y_i - y_l|) / ndcg_temperature), "
        "g = 2^psi - 1, disc(j) = 1 / log2(1 + j)",
        paper="Zhao et al. 2024, arXiv:2410.04346 (OPO), with Pobrotyn et al. 2021, "
        "arXiv:2102.07831",
        parameters=("beta", "ndcg_temperature"),
    ),
    LossType(
        name="approx_ndcg",
        formula="-sum_i g_i / log2(1 + pos_i) / IDCG, "
        "pos_i = 1 + sum_(j != i) s(-ndcg_alpha (y_i - y_j))",
        paper="Qin et al. 2010, as in Zhao et al. 2024, arXiv:2410.04346",
        parameters=("beta", "ndcg_alpha"),
    ),
    LossType(
        name="lipo_lambda",
        formula="sum over pairs psi_i > psi_j of w_ij sp(-(y_i - y_j)), "
        "w_ij = |1 / log2(1 + rank_i) - 1 / log2(1 + rank_j)| |g_i - g_j|, rank by y",
        paper="Liu et al. 2024, arXiv:2402.01878",
        parameters=("beta",),
    ),
    LossType(
        name="list_mle",
        formula="sum_k log(sum_(l >= k) exp(y_l)) - y_k, in order of falling psi",
        paper="Xia et al. 2008; DPO's Plackett-Luce form, Rafailov et al. 2023, arXiv:2305.18290",
        parameters=("beta",),
    ),
    LossType(
        name="all_pairs",
        formula="mean over pairs psi_i > psi_j of sp(-(y_i - y_j))",
        paper="Bradley-Terry on every pair, as in Zhao et al. 2024, arXiv:2410.04346",
        parameters=("beta",),
    ),
    LossType(
        name="best_vs_rest",
        formula="mean over j with psi_j < max psi of sp(-(y_best - y_j))",
        paper="the best response against each other one, as in Zhao et al. 2024, arXiv:2410.04346",
        parameters=("beta",),
    ),
)


def loss_type_of(name: str, table: tuple[LossType, ...] = LOSS_TYPES) -> LossType:
    """Return the row called ``name``; the name has been checked."""
    return next(row for row in table if row.name == name)


def formula_lines(table: tuple[LossType, ...], *, indent: int) -> str:
    """Return ``name: formula`` of every row, wrapped, for a docstring indented by four."""
    first, after = " " * (indent - 4), " " * (indent + 4)
    wrapped = [
        textwrap.fill(
            f"{row.name}: {row.formula}",
            width=100,
            initial_indent=" " * indent,
            subsequent_indent=after,
        )
        for row in table
    ]
    # the placeholder's own indent stands before the first line
    return first + "\n".join(wrapped).lstrip()


def ada_inverse_root(rho: float) -> float:
    """Return 1 / u where u > 0 solves H(s(u)) = log 2 - rho, H the binary entropy in nats.

    Ada-DPO's temperature is |m| / u inside its bounds; from rho = log 2 on there is no root and the
    smallest temperature is best, so 0 is returned.
    """
    if rho >= math.log(2.0):
        return 0.0

    def entropy(u: float) -> float:
        return math.log1p(math.exp(-u)) + u / (1.0 + math.exp(u))

    low, high = 0.0, 700.0
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return 1.0 / high
        low, high = (middle, high) if entropy(middle) > math.log(2.0) - rho else (low, middle)
