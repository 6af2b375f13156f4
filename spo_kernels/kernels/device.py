"""Facts about the device a kernel runs on, and the one switch the interpreter needs."""

import contextlib

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from spo_kernels.calls.backends import triton_interpreter_on

# tl.dot on bf16 is wrong in triton's interpreter, so kernels upcast there and only there
INTERPRET = tl.constexpr(triton_interpreter_on())


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Return fp32 ``x`` rounded to nearest even in ``dtype``; the interpreter truncates to bf16."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def rounded_product(x, y):
    """Return ``x * y``, rounded before anything is added: a compiler fuses ``*`` where it can."""
    if INTERPRET:
        return x * y
    else:
        return libdevice.mul_rn(x, y)


def arch_of(device: torch.device) -> str:
    """Return ``"sm_90"``-style architecture; the interpreter on a CPU counts as sm_80."""
    if device.type != "cuda":
        return "sm_80"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def program_count(device: torch.device) -> int:
    """Return how many programs a persistent grid launches: one an SM (4 in the interpreter)."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_bytes(device: torch.device) -> int:
    """Return the shared memory one block may use (sm_80's in the interpreter)."""
    if device.type != "cuda":
        return 163 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def device_guard(tensor: torch.Tensor):
    """Return a context in which launches go to the tensor's own device."""
    if tensor.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up; ``triton.cdiv`` takes microseconds for it."""
    return -(-a // b)
