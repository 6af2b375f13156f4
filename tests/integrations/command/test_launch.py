"""``accelerate launch`` with each configuration of the package: two processes train like one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spo_kernels import cli, integrations
from tests.helpers.trl_tiny import made_pairs
from tests.helpers.two_processes import DEADLINE_S, free_port

CONFIGS = sorted((Path(integrations.__path__[0]) / "accelerate_configs").glob("*.yaml"))
STEPS = 2
WEIGHTS = "model.safetensors"
# a port that another test took first, and what gloo of torch 2.13 may do at the interpreter's exit
NOT_OURS = ("EADDRINUSE", "terminate called without an active exception")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, made_pairs(16))), encoding="utf-8")
    return path


def flags(pairs: Path, folder: Path, *, batch_size: int, on_gpu: bool = False) -> list[str]:
    values = {
        "dataset_name": pairs,
        "model_config": "tiny",
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_length": 128,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
    }
    return [
        "train",
        *(word for name, value in values.items() for word in (f"--{name}", f"{value}")),
    ]


@pytest.fixture(scope="module")
def alone(pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(flags(pairs, folder, batch_size=4)) == 0
    return folder


def launch(config: Path, pairs: Path, folder: Path, more: list[str], *, on_gpu: bool) -> dict:
    """Return the weights that ``accelerate launch`` of a training run leaves behind."""
    module = "spo_kernels.cli"
    if config.stem.startswith("zero"):
        if find_spec("deepspeed") is None:
            pytest.skip("deepspeed is needed")
        if not on_gpu:
            module = "tests.helpers.cli_on_gloo"
    log = folder.with_suffix(".log")
    for _ in range(2):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--main_process_port", str(free_port()), *more, "-m", module]
        with log.open("w") as output:
            code = subprocess.run(
                [*command, *flags(pairs, folder, batch_size=2, on_gpu=on_gpu)],
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=DEADLINE_S,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).returncode
        if code == 0 or not any(fault in log.read_text() for fault in NOT_OURS):
            break
    assert code == 0, log.read_text()[-4000:]
    return load_file(folder / WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_trains_like_one_process(config, pairs, alone, tmp_path):
    """On a CPU Accelerate runs the FSDP file as DDP."""
    more = ["--cpu"] if torch.cuda.is_available() else []
    more += ["--mixed_precision", "no"]
    if config.stem == "fsdp2":
        # else only one process loads the weights, which FSDP, off on a CPU, would send the other
        more += ["--fsdp_cpu_ram_efficient_loading", "false"]
    found = launch(config, pairs, tmp_path / "out", more, on_gpu=False)
    start, expected = (load_file(folder / WEIGHTS) for folder in (alone / "initial_model", alone))
    # ZeRO-2 saves a tied head as well
    assert found.keys() - expected.keys() <= {"lm_head.weight"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert max((expected[n] - start[n]).abs().max() for n in expected) > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_trains_on_gpus(config, pairs, tmp_path, cuda_device):
    """The files as they are, with bf16, on as many GPUs as there are."""
    count = torch.cuda.device_count()
    found = launch(config, pairs, tmp_path / "out", ["--num_processes", str(count)], on_gpu=True)
    start = load_file(tmp_path / "out" / "initial_model" / WEIGHTS)
    for name, before in start.items():
        assert found[name].isfinite().all() and not torch.equal(found[name].float(), before), name
