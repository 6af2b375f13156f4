"""The SPO configs: every range, their place on a command line, the TRL versions refused."""

import pytest
from transformers import HfArgumentParser

from spo_kernels.integrations import (
    SPOConfig,
    SPOCPOConfig,
    SPOKTOConfig,
    SPOORPOConfig,
    trl_version,
)
from spo_kernels.integrations.spo.config import LOSS_TYPES, SPOSettings
from tests.helpers.trl_tiny import arguments

BAD = [
    ({"gamma": -0.1}, "gamma must be a finite number >= 0.0, got -0.1"),
    ({"gamma": float("nan")}, "gamma must be a finite number >= 0.0, got nan"),
    ({"num_degrees": 1}, "num_degrees must be a finite number >= 2 and <= 16, got 1"),
    ({"num_degrees": 17}, "num_degrees must be a finite number >= 2 and <= 16, got 17"),
    ({"num_degrees": 4.0}, "num_degrees must be an int, got 4.0"),
    ({"view": "tokens"}, "view must be one of 'hidden', 'text', got 'tokens'"),
    ({"pooling": "max"}, "pooling must be one of 'mean', 'last', got 'max'"),
    ({"pooling": "last"}, "pooling must be 'mean' with view='hidden', whose views all end in"),
    ({"kernel_backend": "cuda"}, "kernel_backend must be one of 'auto', 'torch', 'triton'"),
    ({"degree_head_learning_rate": 0.0}, "degree_head_learning_rate must be a finite number > 0"),
    ({"logprob_budget_mib": 0}, "logprob_budget_mib must be a finite number > 0.0, got 0"),
    ({"key_content_stop_words": "the"}, "key_content_stop_words must be a list of words, got the"),
    ({"loss_type": "dpo"}, "loss_type must be one of 'aot', .* 'sppo_hard', got 'dpo'"),
    ({"loss_type": ["sigmoid", "dpo"]}, "loss_type must be one of .* got 'dpo'"),
    ({"loss_type": []}, r"loss_type must name at least one loss, got \[\]"),
    ({"beta": 0.0}, "beta must be a finite number > 0.0, got 0.0"),
    ({"label_smoothing": 0.5}, "label_smoothing must be a finite number >= 0.0 and < 0.5, got 0.5"),
    ({"ld_alpha": 1.5}, "ld_alpha must be a finite number >= 0.0 and <= 1.0, got 1.5"),
    ({"discopop_tau": 0.0}, "discopop_tau must be a finite number > 0.0, got 0.0"),
    ({"max_length": 1}, "max_length must be a finite number >= 2, got 1"),
]


# what only the other configs have
BAD_KTO = [
    (
        {"loss_type": "sigmoid"},
        "loss_type must be one of 'kto', 'apo_zero_unpaired', got 'sigmoid'",
    ),
    ({"desirable_weight": -1.0}, "desirable_weight must be a finite number >= 0.0, got -1.0"),
    ({"undesirable_weight": -1.0}, "undesirable_weight must be a finite number >= 0.0, got -1.0"),
    ({"beta": 0.0}, "beta must be a finite number > 0.0, got 0.0"),
    ({"share_degree_head": False}, "share_degree_head must be True, since a row"),
]
BAD_PAIRS = [
    ({"is_encoder_decoder": True}, "is_encoder_decoder must be unset or False: the fused LM head"),
    ({"max_length": 1}, "max_length must be a finite number >= 2, got 1"),
]
BAD_CPO = [
    ({"loss_type": "kto_pair"}, "loss_type must be one of 'sigmoid', .* 'alphapo', got 'kto_pair'"),
    ({"label_smoothing": 0.5}, "label_smoothing must be a finite number >= 0.0 and < 0.5, got 0.5"),
    ({"cpo_alpha": -1.0}, "cpo_alpha must be a finite number >= 0.0, got -1.0"),
    ({"simpo_gamma": float("inf")}, "simpo_gamma must be a finite number, got inf"),
    ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
]
CONFIGS = (SPOConfig, SPOKTOConfig, SPOCPOConfig, SPOORPOConfig)
EVERY_BAD = [(SPOConfig, *bad) for bad in BAD]
EVERY_BAD += [(kind, *bad) for kind in CONFIGS[1:] for bad in BAD[:12]]
EVERY_BAD += [(SPOKTOConfig, *bad) for bad in BAD_KTO]
EVERY_BAD += [(SPOCPOConfig, *bad) for bad in BAD_PAIRS + BAD_CPO]
EVERY_BAD += [(SPOORPOConfig, *bad) for bad in BAD_PAIRS]
EVERY_BAD += [(SPOORPOConfig, {"beta": -0.1}, "beta must be a finite number >= 0.0, got -0.1")]


@pytest.mark.parametrize(("kind", "settings", "message"), EVERY_BAD, ids=lambda v: str(v)[:40])
def test_ranges(tmp_path, kind, settings, message):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {message}"):
        arguments(tmp_path, kind, **settings)


def test_defaults(tmp_path):
    config = arguments(tmp_path)
    assert (config.num_degrees, config.view, config.pooling) == (4, "hidden", "mean")
    assert config.degree_head_learning_rate == 1e-2
    assert config.center_views is False and config.share_degree_head is True
    every = {"loss_type": list(LOSS_TYPES), "label_smoothing": 0.1}
    assert arguments(tmp_path, **every, gamma=0).gamma == 0


def test_command_line(tmp_path):
    own = set(SPOSettings.__annotations__)
    assert own < set(SPOConfig.__dataclass_fields__)
    for name, field in SPOConfig.__dataclass_fields__.items():
        if name in own:
            assert field.metadata["help"].endswith("."), name
    assert all(own <= set(kind.__dataclass_fields__) for kind in CONFIGS)
    words = "--gamma 0.2 --view text --pooling last --key_content_stop_words der die --bf16 False"
    flags = ["--output_dir", str(tmp_path), *words.split(), "--use_cpu"]
    for kind in CONFIGS:
        (config,) = HfArgumentParser(kind).parse_args_into_dataclasses(flags)
        assert (config.gamma, config.view, config.pooling) == (0.2, "text", "last")
        assert config.key_content_stop_words == ["der", "die"]


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "1.17.0.dev0", "2.0.0"])
def test_untested_trl(monkeypatch, found):
    monkeypatch.setattr(trl_version, "version", lambda name: found)
    with pytest.raises(RuntimeError, match=f"trl must be >= 1.16 and < 1.17, got {found}. pip"):
        trl_version.check_trl()


def test_tested_or_missing_trl(monkeypatch):
    monkeypatch.setattr(trl_version, "version", lambda name: "1.16.3")
    trl_version.check_trl()

    def missing(name):
        raise trl_version.PackageNotFoundError(name)

    monkeypatch.setattr(trl_version, "version", missing)
    with pytest.raises(ImportError, match=r"trl is not installed\. pip install 'trl>=1.16,<1.17'"):
        trl_version.check_trl()
