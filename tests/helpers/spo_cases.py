"""SPO's trainers beside KTO, CPO and ORPO, built like TRL's own in ``trl_trainers``."""

import dataclasses

from spo_kernels.integrations import (
    SPOCPOConfig,
    SPOCPOTrainer,
    SPOKTOConfig,
    SPOKTOTrainer,
    SPOORPOConfig,
    SPOORPOTrainer,
)
from tests.helpers.trl_trainers import CASES, Case, Data, build

CLASSES = {
    "kto": (SPOKTOTrainer, SPOKTOConfig),
    "cpo": (SPOCPOTrainer, SPOCPOConfig),
    "simpo": (SPOCPOTrainer, SPOCPOConfig),
    "alphapo": (SPOCPOTrainer, SPOCPOConfig),
    "orpo": (SPOORPOTrainer, SPOORPOConfig),
}
METHODS = ("kto", "cpo", "orpo")
VIEWS = ("hidden", "text")


def spo_case(name: str) -> Case:
    trainer, config = CLASSES[name]
    return dataclasses.replace(CASES[name], trainer=trainer, config=config)


def build_spo(name: str, data: Data, folder, adapter=None, **settings):
    return build(name, data, folder, adapter, case=spo_case(name), **settings)
