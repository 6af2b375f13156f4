"""Shared fixtures: hypothesis profile, backends, where the real preference pairs lie."""

import math
import os
from pathlib import Path

import pytest

# triton reads this once, at import: kernels run in its interpreter here and are compiled in
# test_kernels_compile*.py, which runs in a process of its own (see the Makefile)
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import torch

from spo_kernels.calls.backends import triton_interpreter_on

hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("repeatable")

# what only modules without a kernel in them import
OPTIONAL = {"accelerate", "datasets", "matplotlib", "peft", "tokenizers", "transformers", "trl"}

REAL_PAIRS = Path(__file__).resolve().parents[2] / "shared" / "data" / "preference_pairs.jsonl"


class OptionalModule(pytest.Module):
    """A test module that is skipped where a library it imports is not installed."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError):
                if cause.name == "spo_kernels.integrations":
                    pytest.skip(f"{cause.name} is not installed, see Developing in README.md")
                if cause.name in OPTIONAL:
                    pytest.skip(f"{cause.name} is not installed")
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    """Be lenient where only GPU tests are asked for: no kernel needs the trainers' libraries."""
    if parent.config.option.markexpr.startswith("gpu"):
        return OptionalModule.from_parent(parent, path=module_path)
    return None


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("torch", "cpu"), id="torch"),
        pytest.param(("triton", "cpu"), id="interpreter"),
        pytest.param(("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
    ],
)
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device) of a run; what this process cannot run is a visible skip."""
    name, device = request.param
    if device == "cuda" and (not torch.cuda.is_available() or triton_interpreter_on()):
        pytest.skip("needs a CUDA device and TRITON_INTERPRET=0")
    if request.param == ("triton", "cpu") and not triton_interpreter_on():
        pytest.skip("needs TRITON_INTERPRET=1")
    return name, device


@pytest.fixture
def cuda_device() -> torch.device:
    """The GPU, or a visible skip."""
    if not torch.cuda.is_available() or triton_interpreter_on():
        pytest.skip("needs a CUDA device and TRITON_INTERPRET=0")
    return torch.device("cuda")


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty hand out NaN: an output that is not fully written shows."""
    make = torch.empty

    def poisoned(*args, **kwargs):
        out = make(*args, **kwargs)
        if out.is_floating_point():
            # torch 2.11's checkpoint makes one that requires a gradient
            with torch.no_grad():
                out.fill_(math.nan)
        return out

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **kw: poisoned(t.shape, dtype=t.dtype, device=t.device)
    )


@pytest.fixture
def real_pairs() -> Path:
    """The file of real preference pairs, or a visible skip."""
    if not REAL_PAIRS.is_file():
        pytest.skip(f"{REAL_PAIRS.name} is not beside the project")
    return REAL_PAIRS
