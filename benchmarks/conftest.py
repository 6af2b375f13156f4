"""Options, fixtures and the result file of ``pytest benchmarks --benchmark-only``."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import results

COMMAND = "pytest benchmarks --benchmark-only"


@dataclasses.dataclass(frozen=True)
class Setting:
    """How this session measures."""

    device: str
    threads: int
    tiny: bool

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else 5


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("spo-kernels benchmarks")
    group.addoption("--tiny", action="store_true", help="toy shapes: does it run, not how fast")
    group.addoption("--results", type=Path, help="result file (default: by machine and commit)")
    group.addoption("--threads", type=int, default=2, help="CPU threads (the bar is set at 2)")


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config) -> Setting:
    threads = pytestconfig.getoption("--threads")
    torch.set_num_threads(threads)
    device = "cuda" if torch.version.cuda and torch.cuda.is_available() else "cpu"
    return Setting(device, threads, pytestconfig.getoption("--tiny"))


@pytest.fixture
def record(benchmark, pytestconfig: pytest.Config, setting: Setting) -> Callable[..., None]:
    """Return a function that keeps a row in the result file and in the benchmark's extra_info."""
    path = pytestconfig.getoption("--results")
    if path is None and not setting.tiny:
        path = results.path_for(setting.device, setting.threads)

    def keep(**row: object) -> None:
        benchmark.extra_info.update(row)
        # at once: an interrupted session keeps what it has measured
        if path is not None:
            # what else ran: above the number of cores, times are the neighbours' too
            whole = {"command": COMMAND, "load": round(os.getloadavg()[0], 1), **row}
            results.merge(path, [whole], device=setting.device, threads=setting.threads)

    return keep
