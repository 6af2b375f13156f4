"""Losses of preference training straight from hidden states and the LM head."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # for type checkers; a test holds this list to the table below
    from spo_kernels.data.collator import PreferenceCollator
    from spo_kernels.data.key_content import (
        KEY_CONTENT_VERSION,
        KeyPhrase,
        character_levels,
        extract_key_content,
        removal_level,
        shorten,
        smart_stop_words,
    )
    from spo_kernels.ops.bradley_terry_loss import BradleyTerryLossOutput, bradley_terry_loss
    from spo_kernels.ops.degree_loss import DegreeLossOutput, degree_loss
    from spo_kernels.ops.linear_logprob import LinearLogprobOutput, linear_logprob
    from spo_kernels.ops.linear_preference_loss import (
        LinearPreferenceLossOutput,
        linear_preference_loss,
    )
    from spo_kernels.ops.listwise_preference_loss import (
        ListwisePreferenceLossOutput,
        listwise_preference_loss,
    )
    from spo_kernels.ops.preference_loss import PreferenceLossOutput, preference_loss
    from spo_kernels.ops.unpaired_preference_loss import (
        UnpairedPreferenceLossOutput,
        unpaired_preference_loss,
    )
    from spo_kernels.ops.warmup import warmup
    from spo_kernels.planner.linear_logprob import Plan, plan_linear_logprob
    from spo_kernels.planner.linear_preference_loss import plan_linear_preference_loss

__version__ = "0.1.0"

# module -> its public names, imported on first use: `spo-kernels --help` must not wait for torch
_PUBLIC = {
    "data.collator": ("PreferenceCollator",),
    "data.key_content": (
        "KEY_CONTENT_VERSION",
        "KeyPhrase",
        "character_levels",
        "extract_key_content",
        "removal_level",
        "shorten",
        "smart_stop_words",
    ),
    "ops.bradley_terry_loss": ("BradleyTerryLossOutput", "bradley_terry_loss"),
    "ops.degree_loss": ("DegreeLossOutput", "degree_loss"),
    "ops.linear_logprob": ("LinearLogprobOutput", "linear_logprob"),
    "ops.linear_preference_loss": ("LinearPreferenceLossOutput", "linear_preference_loss"),
    "ops.listwise_preference_loss": ("ListwisePreferenceLossOutput", "listwise_preference_loss"),
    "ops.preference_loss": ("PreferenceLossOutput", "preference_loss"),
    "ops.unpaired_preference_loss": ("UnpairedPreferenceLossOutput", "unpaired_preference_loss"),
    "ops.warmup": ("warmup",),
    "planner.linear_logprob": ("Plan", "plan_linear_logprob"),
    "planner.linear_preference_loss": ("plan_linear_preference_loss",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
