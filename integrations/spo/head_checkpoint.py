"""Saves the degree head beside a checkpoint and restores it bit for bit, sharded or not."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from spo_kernels.integrations.spo.degree_head import DegreeHead

HEAD_FILE = "spo_degree_head.safetensors"


def save_head(head: DegreeHead, folder: str, *, write: bool) -> None:
    """Save the head to ``folder``; every rank calls it, since sharded weights are gathered."""
    with maybe_gather_lm_head_ctx(*head.parameters()):
        state = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
            for name, value in head.named_parameters()
        }
        if write:
            save_file({name: value.contiguous() for name, value in state.items()}, _file(folder))


def require_head(folder: str) -> None:
    """Raise FileNotFoundError unless the checkpoint in ``folder`` has a degree head."""
    if not _file(folder).is_file():
        raise FileNotFoundError(
            f"SPO trainer: checkpoint {str(folder)!r} must hold {HEAD_FILE}, got none. It was not "
            "saved by an SPO trainer with gamma > 0; start from it as a model instead of resuming."
        )


def load_head(head: DegreeHead, folder: str) -> None:
    """Copy the saved head of ``folder`` into ``head``."""
    require_head(folder)
    state = load_file(_file(folder))
    for name, parameter in head.named_parameters():
        saved = state[name]
        if saved.shape != parameter.shape:
            raise ValueError(
                f"SPO trainer: the degree head in {str(folder)!r} must have {name} of shape "
                f"{tuple(parameter.shape)}, got {tuple(saved.shape)}. Resume with the num_degrees "
                "and share_degree_head of that run."
            )
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                saved = distribute_tensor(
                    saved.to(parameter.device), parameter.device_mesh, parameter.placements
                )
            parameter.copy_(saved)


def _file(folder: str) -> Path:
    return Path(folder) / HEAD_FILE
