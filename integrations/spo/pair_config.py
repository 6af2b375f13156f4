"""``SPOCPOConfig`` and ``SPOORPOConfig``: TRL's settings of methods without a reference model."""

from dataclasses import dataclass

from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

from spo_kernels.integrations.spo.config import SPOSettings


class _DecoderOnly(SPOSettings):
    def __post_init__(self) -> None:
        if self.is_encoder_decoder:
            self._fail(
                "is_encoder_decoder",
                "be unset or False: the fused LM head and the views need prompt and response in "
                "one sequence",
                self.is_encoder_decoder,
            )
        super().__post_init__()


@dataclass
class SPOCPOConfig(_DecoderOnly, CPOConfig):
    """Settings of ``SPOCPOTrainer``: those of TRL's ``CPOConfig`` and of ``SPOSettings``."""

    def __post_init__(self) -> None:
        self._check_listed("loss_type")
        self._check_number("beta", self.beta, above=0.0)
        self._check_number("label_smoothing", self.label_smoothing, low=0.0, below=0.5)
        self._check_number("cpo_alpha", self.cpo_alpha, low=0.0)
        self._check_number("simpo_gamma", self.simpo_gamma)
        self._check_number("alpha", self.alpha)
        super().__post_init__()


@dataclass
class SPOORPOConfig(_DecoderOnly, ORPOConfig):
    """Settings of ``SPOORPOTrainer``: those of TRL's ``ORPOConfig`` and of ``SPOSettings``."""

    def __post_init__(self) -> None:
        self._check_number("beta", self.beta, low=0.0)
        super().__post_init__()
