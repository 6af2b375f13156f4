"""Runs a scenario of a test file in two gloo processes on this machine, and ends them in order.

The test file is its own worker: it calls ``work(SCENARIOS)`` when it is run as a module.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.helpers.processes import ROOT

DEADLINE_S = 240


def run_two_processes(file: str, scenario: str, folder: Path, **environment: str) -> None:
    """Run ``scenario`` of the test in ``file``; fail with the output of the process that failed."""
    module = ".".join(Path(file).relative_to(ROOT).with_suffix("").parts)
    command = [sys.executable, "-W", "ignore", "-m", module, scenario, str(folder)]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    # files, since a pipe that nobody reads yet would block one process and then the other
    logs = [folder / f"{scenario}-{rank}.log" for rank in range(2)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as output:
                workers.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=shared | ranks,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        codes = _wait(workers)
    finally:
        for worker in workers:
            worker.kill()
    for rank, code in enumerate(codes):
        # None: it still ran when the other one failed, or at the deadline
        if code or codes == [None, None]:
            text = logs[rank].read_text()[-4000:]
            raise AssertionError(f"{scenario}: process {rank} ended with {code}\n{text}")


def _wait(workers: list[subprocess.Popen]) -> list[int | None]:
    """Wait until both have ended, one has failed, or the time is up."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        codes = [worker.poll() for worker in workers]
        if None not in codes or any(codes):
            return codes
        if time.monotonic() > deadline:
            return [None, None]
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(scenarios: dict[str, Callable[[Path], None]]) -> None:
    """Run the scenario that the command line names; no process leaves before the other is done."""
    name, folder = sys.argv[1:]
    scenarios[name](Path(folder))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # a DDP model keeps gloo's threads alive past that, and the interpreter's own exit then aborts
    # now and then with "terminate called without an active exception" (torch 2.13)
    sys.stdout.flush()
    os._exit(0)


def rank() -> int:
    return int(os.environ["RANK"])


def assert_equal_across_ranks(state: dict[str, torch.Tensor]) -> None:
    for name, value in state.items():
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value.contiguous())
        assert torch.equal(both[0], both[1]), name
