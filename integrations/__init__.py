"""Trainer adapters, data recipes; each is imported on first use: this package needs no trainer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spo_kernels.integrations.data_recipes import (
        RewardAugmentation,
        ScoreMarginFilter,
        mix_on_policy,
    )
    from spo_kernels.integrations.transformers_trainer import fuse_lm_head
    from spo_kernels.integrations.trl_config import SPOConfig, SPOKTOConfig
    from spo_kernels.integrations.trl_pair_config import SPOCPOConfig, SPOORPOConfig
    from spo_kernels.integrations.trl_pair_trainers import SPOCPOTrainer, SPOORPOTrainer
    from spo_kernels.integrations.trl_patch import TRLPatch, patch_trl
    from spo_kernels.integrations.trl_trainer import SPOKTOTrainer, SPOTrainer

__all__ = [
    "RewardAugmentation",
    "SPOCPOConfig",
    "SPOCPOTrainer",
    "SPOConfig",
    "SPOKTOConfig",
    "SPOKTOTrainer",
    "SPOORPOConfig",
    "SPOORPOTrainer",
    "SPOTrainer",
    "ScoreMarginFilter",
    "TRLPatch",
    "fuse_lm_head",
    "mix_on_policy",
    "patch_trl",
]

_MODULE_OF = {
    "RewardAugmentation": "data_recipes",
    "SPOCPOConfig": "trl_pair_config",
    "SPOCPOTrainer": "trl_pair_trainers",
    "SPOConfig": "trl_config",
    "SPOKTOConfig": "trl_config",
    "SPOKTOTrainer": "trl_trainer",
    "SPOORPOConfig": "trl_pair_config",
    "SPOORPOTrainer": "trl_pair_trainers",
    "SPOTrainer": "trl_trainer",
    "ScoreMarginFilter": "data_recipes",
    "TRLPatch": "trl_patch",
    "fuse_lm_head": "transformers_trainer",
    "mix_on_policy": "data_recipes",
    "patch_trl": "trl_patch",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULE_OF[name]
    # patch_trl checks by itself, since it may be told to go on
    if module.startswith("trl_") and module != "trl_patch":
        importlib.import_module(f"{__name__}.trl_version").check_trl()
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
