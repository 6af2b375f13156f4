"""Result files: one slim JSON per machine and commit, rows merged by what they measure."""

import importlib.metadata
import json
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_PACKAGES = ("trl", "transformers", "triton", "liger-kernel", "cut-cross-entropy")
# a new measurement of the same thing replaces the old one
_KEY = ("kind", "workload", "provider", "pass", "seeds")


def machine_facts(device: str, threads: int) -> dict[str, Any]:
    """Return what the numbers depend on: device, versions, threads; no host name, no path."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    if device.startswith("cuda"):
        facts["device"] = torch.cuda.get_device_name()
        facts["driver"] = _nvidia_driver()
        facts["cuda"] = torch.version.cuda
        facts["sm"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
    else:
        facts["device"] = _cpu_model()
        facts["threads"] = threads
    return facts


def commit() -> str:
    """Return the short commit, with ``-dirty`` where the measured code differs from it."""
    head = _git("rev-parse", "--short=10", "HEAD")
    if not head:
        return "uncommitted"
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!*.md")
    return head + ("-dirty" if changed else "")


def path_for(device: str, threads: int) -> Path:
    """Return the file of this machine and commit."""
    name = machine_facts(device, threads)["device"]
    if not device.startswith("cuda"):
        name = f"cpu {name} {threads} threads"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{slug}-{commit()}.json"


def load(path: Path) -> dict[str, Any]:
    """Return the document of a result file, an empty one where there is none."""
    if not path.exists():
        return {"machine": {}, "commit": None, "rows": []}
    return json.loads(path.read_text())


def merge(
    path: Path, rows: list[Row], *, device: str, threads: int, stage: str | None = None
) -> None:
    """Add rows to a result file; a row about the same thing as an older one replaces it.

    ``stage`` is noted as finished, so that a restarted run can leave it out.
    """
    document = load(path)
    document["machine"] = machine_facts(device, threads)
    document["commit"] = commit()
    document["made"] = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
    if stage is not None:
        document["stages"] = sorted({*document.get("stages", ()), stage})
    merged = {row_key(row): row for row in document["rows"]}
    merged.update({row_key(row): row for row in rows})
    document["rows"] = list(merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    # one row a line: small, and a change shows as a line
    lines = ",\n".join("  " + json.dumps(row) for row in document["rows"])
    head = json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1)[:-2]
    whole = f'{head},\n "rows": [\n{lines}\n ]\n}}\n'
    partial = path.with_suffix(".partial")
    partial.write_text(whole)
    partial.replace(path)


def row_key(row: Row) -> tuple:
    """Return what a row is about."""
    return tuple(str(row.get(name)) for name in _KEY)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 else None
