"""``SPOConfig`` and ``SPOKTOConfig``: TRL's settings and the degree loss's, checked on creation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from trl import DPOConfig, KTOConfig

LOSS_TYPES = (
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "discopop",
    "exo_pair",
    "hinge",
    "ipo",
    "nca_pair",
    "robust",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "sppo_hard",
)


@dataclass
class SPOSettings:
    """The settings that every SPO trainer adds to those of its trainer of TRL.

    Comes before TRL's config among the bases. K, gamma, the pooling and the head are this project's
    definitions; the SPO paper's values are not public.
    """

    gamma: float = field(
        default=0.1,
        metadata={"help": "Weight of the degree loss, >= 0. With 0 the trainer is TRL's own."},
    )
    num_degrees: int = field(
        default=4,
        metadata={
            "help": "Number K of preference degrees, 2 to 16: view k of a response lacks the key "
            "content of levels 1 to k."
        },
    )
    view: str = field(
        default="hidden",
        metadata={
            "help": "'hidden' pools the last hidden states of the tokens that a view keeps and "
            "needs no extra forward pass; 'text' runs the K - 1 shortened responses through the "
            "model, in the same forward call.",
            "choices": ["hidden", "text"],
        },
    )
    pooling: str = field(
        default="mean",
        metadata={
            "help": "How the hidden states of a view become one vector: 'mean', or 'last' (its "
            "last token, only with view='text').",
            "choices": ["mean", "last"],
        },
    )
    center_views: bool = field(
        default=False,
        metadata={"help": "Subtract each response's mean over its views before the degree head."},
    )
    share_degree_head: bool = field(
        default=True,
        metadata={"help": "One degree head for chosen and rejected responses, or one each."},
    )
    degree_head_learning_rate: float = field(
        default=1e-2,
        metadata={
            "help": "Learning rate of the degree head, > 0. At the model's rate it learns nothing."
        },
    )
    key_content_language: str = field(
        default="en",
        metadata={
            "help": "Language of the responses. Only 'en' has a stop list; for another one set "
            "`key_content_stop_words`."
        },
    )
    key_content_stop_words: list[str] | None = field(
        default=None,
        metadata={"help": "Stop words that end a key phrase, instead of the language's own list."},
    )
    logprob_budget_mib: float | None = field(
        default=None,
        metadata={
            "help": "Workspace in MiB that the log-probs of one forward call may use, > 0. Unset: "
            "the default of `linear_logprob`."
        },
    )
    kernel_backend: str = field(
        default="auto",
        metadata={
            "help": "Backend of log-probs and degree loss: 'auto' (Triton on a CUDA device, torch "
            "elsewhere), 'torch' or 'triton'.",
            "choices": ["auto", "torch", "triton"],
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.key_content_stop_words, str):
            self._fail("key_content_stop_words", "be a list of words", self.key_content_stop_words)
        self._check_number("gamma", self.gamma, low=0.0)
        if isinstance(self.num_degrees, bool) or not isinstance(self.num_degrees, int):
            self._fail("num_degrees", "be an int", self.num_degrees)
        self._check_number("num_degrees", self.num_degrees, low=2, high=16)
        for name in ("view", "pooling", "kernel_backend"):
            self._check_listed(name)
        if self.pooling == "last" and self.view == "hidden":
            self._fail(
                "pooling",
                "be 'mean' with view='hidden', whose views all end in the same token",
                "'last'",
            )
        self._check_number("degree_head_learning_rate", self.degree_head_learning_rate, above=0.0)
        if self.logprob_budget_mib is not None:
            self._check_number("logprob_budget_mib", self.logprob_budget_mib, above=0.0)
        if self.max_length is not None:
            self._check_number("max_length", self.max_length, low=2)
        super().__post_init__()

    def _fail(self, argument: str, requirement: str, got: Any) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {argument} must {requirement}, got {got}")

    def _check_choice(self, argument: str, value: Any, choices: Sequence[str]) -> None:
        if value not in choices:
            names = ", ".join(repr(name) for name in choices)
            self._fail(argument, f"be one of {names}", repr(value))

    def _check_listed(self, name: str) -> None:
        choices = self.__dataclass_fields__[name].metadata["choices"]
        self._check_choice(name, getattr(self, name), choices)

    def _check_number(
        self,
        argument: str,
        value: Any,
        *,
        low: float | None = None,
        above: float | None = None,
        below: float | None = None,
        high: float | None = None,
    ) -> None:
        bounds = {">=": low, ">": above, "<": below, "<=": high}
        requirement = " and ".join(
            f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None
        )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        inside = (
            number
            and math.isfinite(value)
            and (low is None or value >= low)
            and (above is None or value > above)
            and (below is None or value < below)
            and (high is None or value <= high)
        )
        if not inside:
            self._fail(argument, f"be a finite number {requirement}".rstrip(), value)


@dataclass
class SPOConfig(SPOSettings, DPOConfig):
    """Settings of ``SPOTrainer``: those of ``trl.DPOConfig`` and of ``SPOSettings``."""

    def __post_init__(self) -> None:
        loss_types = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        if not loss_types:
            self._fail("loss_type", "name at least one loss", loss_types)
        for name in loss_types:
            self._check_choice("loss_type", name, LOSS_TYPES)
        self._check_number("beta", self.beta, above=0.0)
        self._check_number("label_smoothing", self.label_smoothing, low=0.0, below=0.5)
        if "exo_pair" in loss_types:
            # its target distribution has the logarithm of the smoothing in it
            self._check_number("label_smoothing of exo_pair", self.label_smoothing, above=0.0)
        self._check_number("discopop_tau", self.discopop_tau, above=0.0)
        if self.ld_alpha is not None:
            self._check_number("ld_alpha", self.ld_alpha, low=0.0, high=1.0)
        super().__post_init__()


@dataclass
class SPOKTOConfig(SPOSettings, KTOConfig):
    """Settings of ``SPOKTOTrainer``: those of ``trl.KTOConfig`` and of ``SPOSettings``."""

    def __post_init__(self) -> None:
        self._check_listed("loss_type")
        self._check_number("beta", self.beta, above=0.0)
        self._check_number("desirable_weight", self.desirable_weight, low=0.0)
        self._check_number("undesirable_weight", self.undesirable_weight, low=0.0)
        if not self.share_degree_head:
            self._fail(
                "share_degree_head",
                "be True, since a row has one response and so one head to read it",
                self.share_degree_head,
            )
        super().__post_init__()
