"""Losses of preference training straight from hidden states and the LM head."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spo_kernels.bradley_terry_loss import BradleyTerryLossOutput, bradley_terry_loss
    from spo_kernels.collator import PreferenceCollator
    from spo_kernels.degree_loss import DegreeLossOutput, degree_loss
    from spo_kernels.key_content import (
        KEY_CONTENT_VERSION,
        KeyPhrase,
        character_levels,
        extract_key_content,
        removal_level,
        shorten,
        smart_stop_words,
    )
    from spo_kernels.linear_logprob import LinearLogprobOutput, linear_logprob
    from spo_kernels.linear_preference_loss import (
        LinearPreferenceLossOutput,
        linear_preference_loss,
    )
    from spo_kernels.listwise_preference_loss import (
        ListwisePreferenceLossOutput,
        listwise_preference_loss,
    )
    from spo_kernels.pair_planner import plan_linear_preference_loss
    from spo_kernels.planner import Plan, plan_linear_logprob
    from spo_kernels.preference_loss import PreferenceLossOutput, preference_loss
    from spo_kernels.unpaired_preference_loss import (
        UnpairedPreferenceLossOutput,
        unpaired_preference_loss,
    )
    from spo_kernels.warmup import warmup

__version__ = "0.1.0"
__all__ = [
    "KEY_CONTENT_VERSION",
    "BradleyTerryLossOutput",
    "DegreeLossOutput",
    "KeyPhrase",
    "LinearLogprobOutput",
    "LinearPreferenceLossOutput",
    "ListwisePreferenceLossOutput",
    "Plan",
    "PreferenceCollator",
    "PreferenceLossOutput",
    "UnpairedPreferenceLossOutput",
    "bradley_terry_loss",
    "character_levels",
    "degree_loss",
    "extract_key_content",
    "linear_logprob",
    "linear_preference_loss",
    "listwise_preference_loss",
    "plan_linear_logprob",
    "plan_linear_preference_loss",
    "preference_loss",
    "removal_level",
    "shorten",
    "smart_stop_words",
    "unpaired_preference_loss",
    "warmup",
]

# public name -> module, imported on first use: `spo-kernels --help` must not wait for torch
_MODULE_OF = {
    "unpaired_preference_loss": "unpaired_preference_loss",
    "UnpairedPreferenceLossOutput": "unpaired_preference_loss",
    "listwise_preference_loss": "listwise_preference_loss",
    "ListwisePreferenceLossOutput": "listwise_preference_loss",
    "KEY_CONTENT_VERSION": "key_content",
    "BradleyTerryLossOutput": "bradley_terry_loss",
    "DegreeLossOutput": "degree_loss",
    "KeyPhrase": "key_content",
    "LinearLogprobOutput": "linear_logprob",
    "LinearPreferenceLossOutput": "linear_preference_loss",
    "Plan": "planner",
    "PreferenceCollator": "collator",
    "PreferenceLossOutput": "preference_loss",
    "bradley_terry_loss": "bradley_terry_loss",
    "character_levels": "key_content",
    "degree_loss": "degree_loss",
    "extract_key_content": "key_content",
    "linear_logprob": "linear_logprob",
    "linear_preference_loss": "linear_preference_loss",
    "plan_linear_logprob": "planner",
    "plan_linear_preference_loss": "pair_planner",
    "preference_loss": "preference_loss",
    "removal_level": "key_content",
    "shorten": "key_content",
    "smart_stop_words": "key_content",
    "warmup": "warmup",
}


class _Package(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{self.__name__}.{_MODULE_OF[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # an op and its module share a name, and importing the module must not hide the op
        if not (name in _MODULE_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_MODULE_OF})


sys.modules[__name__].__class__ = _Package
