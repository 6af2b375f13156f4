"""Adapters to trainers; each name is imported on first use, so this package imports no trainer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spo_kernels.integrations.trl_config import SPOConfig
    from spo_kernels.integrations.trl_trainer import SPOTrainer

__all__ = ["SPOConfig", "SPOTrainer"]

_MODULE_OF = {"SPOConfig": "trl_config", "SPOTrainer": "trl_trainer"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.trl_version").check_trl()
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
