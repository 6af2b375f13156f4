"""Which backend runs a call: the caller's choice, if the machine can."""

import importlib.util
import os
from collections.abc import Mapping

import torch

from spo_kernels.calls.checks import FLOAT_DTYPES, check_choice, dtype_name, fail


def refuse_fp64_on_triton(
    op: str, backend: str, dtypes: Mapping[str, torch.dtype | torch.Tensor | None]
) -> None:
    """Require half or single precision of every argument where the resolved backend is triton."""
    if backend != "triton":
        return
    for argument, value in dtypes.items():
        dtype = value.dtype if isinstance(value, torch.Tensor) else value
        if dtype is not None and dtype not in FLOAT_DTYPES:
            names = ", ".join(dtype_name(allowed) for allowed in FLOAT_DTYPES)
            fail(
                op,
                argument,
                f"have dtype {names} on backend='triton'",
                dtype_name(dtype),
                way_out="Use backend='torch'.",
                error=TypeError,
            )


# facts of the machine, which torch.compile must not trace
@torch.compiler.assume_constant_result
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _has_bf16_cores(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def triton_interpreter_on() -> bool:
    """Whether Triton kernels run in its interpreter, the only way they run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def resolve_backend(op: str, backend: str, tensor: torch.Tensor) -> str:
    """Return ``"triton"`` or ``"torch"``.

    ``"auto"``: Triton for a CUDA tensor on compute capability >= 8.0 where triton is installed, the
    torch backend everywhere else. An explicit backend that cannot run raises.
    """
    check_choice(op, "backend", backend, ("auto", "torch", "triton"))
    if backend == "torch":
        return "torch"
    on_gpu = tensor.device.type == "cuda" and torch.version.cuda is not None
    if backend == "auto" and not on_gpu:
        return "torch"
    # a walk along the import path: only where the answer matters
    installed = _triton_installed()
    if backend == "auto":
        return "triton" if installed and _has_bf16_cores(tensor.device) else "torch"
    if not installed:
        raise NotImplementedError(
            f"{op}: backend='triton' needs the triton package, which is not installed. "
            "Use backend='torch' or backend='auto'."
        )
    if not on_gpu and not triton_interpreter_on():
        raise ValueError(
            f"{op}: backend='triton' needs a CUDA tensor, got {tensor.device.type}. "
            "Use backend='torch' or backend='auto'."
        )
    return "triton"
