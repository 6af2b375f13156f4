"""Shared fixtures: hypothesis profile, backends, the file of real preference pairs."""

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real_pairs",
        metavar="PATH",
        help="conversational preference pairs (JSON lines: prompt, chosen, rejected), 300 or more, "
        "for the tests on real input, which are skipped without it",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--real_pairs")
    if path is not None and not Path(path).is_file():
        raise pytest.UsageError(f"--real_pairs must be a file, got {path!r}")


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
def real_pairs(request: pytest.FixtureRequest) -> Path:
    """The file that ``--real_pairs`` names, or a visible skip."""
    path = request.config.getoption("--real_pairs")
    if path is None:
        pytest.skip("needs --real_pairs PATH (make test REAL_PAIRS=PATH)")
    return Path(path).resolve()
