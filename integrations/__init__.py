"""Trainer adapters, data recipes; each is imported on first use: this package needs no trainer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # for type checkers; a test holds this list to the table below
    from spo_kernels.integrations.data.recipes import (
        RewardAugmentation,
        ScoreMarginFilter,
        mix_on_policy,
    )
    from spo_kernels.integrations.lm_head.fuse_lm_head import fuse_lm_head
    from spo_kernels.integrations.spo.config import SPOConfig, SPOKTOConfig
    from spo_kernels.integrations.spo.pair_config import SPOCPOConfig, SPOORPOConfig
    from spo_kernels.integrations.spo.pair_trainers import SPOCPOTrainer, SPOORPOTrainer
    from spo_kernels.integrations.spo.trainer import SPOKTOTrainer, SPOTrainer
    from spo_kernels.integrations.trl_patch.change import TRLPatch
    from spo_kernels.integrations.trl_patch.patch import patch_trl

_PUBLIC = {
    "data.recipes": ("RewardAugmentation", "ScoreMarginFilter", "mix_on_policy"),
    "lm_head.fuse_lm_head": ("fuse_lm_head",),
    "spo.config": ("SPOConfig", "SPOKTOConfig"),
    "spo.pair_config": ("SPOCPOConfig", "SPOORPOConfig"),
    "spo.pair_trainers": ("SPOCPOTrainer", "SPOORPOTrainer"),
    "spo.trainer": ("SPOKTOTrainer", "SPOTrainer"),
    "trl_patch.change": ("TRLPatch",),
    "trl_patch.patch": ("patch_trl",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULE_OF[name]
    # before anything of TRL is imported; patch_trl checks by itself, since it may be told to go on
    if module.startswith("spo."):
        importlib.import_module(f"{__name__}.trl_version").check_trl()
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
