"""Peak memory of one forward + backward: the CUDA allocator's, or a fresh process's growth.

On a CPU the process is started for the one measurement (``python -m benchmarks.memory``): the
libraries are warmed up at a tiny shape first, then the growth of the resident high-water mark over
two runs is what the provider needed beyond its inputs. Gradients it returns are counted, for
everybody alike. That growth holds what malloc and the math library keep too, so the planner is held
against ``workspace_bytes``: the tensors that a call makes, counted while they live.
"""

import argparse
import dataclasses
import importlib
import json
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import providers
from benchmarks.workloads import Workload

_ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT_S = 600


def peak_bytes(provider: str, workload: Workload, device: str, *, threads: int) -> int:
    """Return the peak of a forward + backward beyond the inputs, gradients included."""
    if device.startswith("cuda"):
        return cuda_peak_bytes(providers.step_of(provider, workload, device))
    return process_peak_bytes(providers.__name__, provider, workload, threads=threads)


def process_peak_bytes(module: str, provider: str, workload: Workload, *, threads: int) -> int:
    """Return the peak of a fresh process that runs the ``step_of`` of a module on the CPU."""
    command = [sys.executable, "-m", "benchmarks.memory", "--module", module]
    command += ["--provider", provider]
    command += ["--workload", json.dumps(dataclasses.asdict(workload)), "--threads", str(threads)]
    done = subprocess.run(
        command, cwd=_ROOT, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"memory of {provider} on {workload.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def cuda_peak_bytes(run: Callable[[], Any]) -> int:
    """Return what the CUDA allocator's peak rises by during one run, after a warm-up."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def workspace_bytes(run: Callable[[], Any]) -> int:
    """Return the peak of the tensors one run makes on a CPU beside those that it returns."""
    with LiveBytes() as live:
        returned = run()
    return live.peak(beside=tree_leaves(returned))


class LiveBytes(TorchDispatchMode):
    """Storages made inside the mode, from when they are made to when they are freed."""

    def __init__(self) -> None:
        super().__init__()
        # (which storage, bytes more or less) in the order it happened
        self.events: list[tuple[int, int]] = []
        self.alive: dict[int, int] = {}

    def peak(self, beside: Sequence[torch.Tensor] = ()) -> int:
        """Return the most bytes alive at once; the storages of ``beside`` do not count."""
        left_out = {self.alive.get(tensor.untyped_storage()._cdata) for tensor in beside}
        now = most = 0
        for storage, change in self.events:
            now += change if storage not in left_out else 0
            most = max(most, now)
        return most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.alive:
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, number, size = storage._cdata, len(self.events), storage.nbytes()
        self.alive[key] = number
        self.events.append((number, size))

        def gone() -> None:
            self.alive.pop(key, None)
            self.events.append((number, -size))

        weakref.finalize(storage, gone)


def resident_growth_bytes(step_of: Callable, provider: str, workload: Workload) -> int:
    """Return the growth of this process's resident high-water mark; it must be a fresh process."""
    tiny_step = step_of(provider, dataclasses.replace(workload, rows=16, vocab=64), "cpu")
    for _ in range(2):
        tiny_step()
    step = step_of(provider, workload, "cpu")
    _reset_high_water()
    before = _high_water_bytes()
    for _ in range(2):
        step()
    return _high_water_bytes() - before


def _reset_high_water() -> None:
    # Linux sets the mark back to the current size; elsewhere drawing the inputs must not exceed it
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _high_water_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Measure one provider on one workload and print the peak as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--module", default=providers.__name__, help="whose step_of to run")
    parser.add_argument("--provider", required=True)
    parser.add_argument("--workload", required=True, help="a Workload's fields as JSON")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workload = Workload(**json.loads(arguments.workload))
    step_of = importlib.import_module(arguments.module).step_of
    peak = resident_growth_bytes(step_of, arguments.provider, workload)
    print(json.dumps({"peak_bytes": peak}))


if __name__ == "__main__":
    main()
