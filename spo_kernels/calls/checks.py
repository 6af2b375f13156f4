"""All error text is born here: shape, dtype, range, device and backend checks shared by the ops.

Form of a message: ``<op>: <argument> must <requirement>, got <value>`` and, where there is one, a
second sentence with the way out. Messages show shapes, indices and types, never tensor data.
"""

import math
from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from spo_kernels.calls.loss_table import Parameter

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fail(
    op: str,
    argument: str,
    requirement: str,
    got: Any,
    *,
    way_out: str = "",
    error: type[Exception] = ValueError,
) -> NoReturn:
    """Raise ``error`` with the one house form of a message."""
    text = f"{op}: {argument} must {requirement}, got {got}"
    raise error(f"{text}. {way_out}" if way_out else text)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Return fp64 if a tensor is fp64, else fp32."""
    is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


def check_tensor(op: str, argument: str, value: Any) -> None:
    """Require a ``torch.Tensor``."""
    if not isinstance(value, torch.Tensor):
        fail(op, argument, "be a tensor", type(value).__name__, error=TypeError)


def check_dtype(
    op: str, argument: str, value: torch.Tensor, allowed: Iterable[torch.dtype]
) -> None:
    """Require one of the ``allowed`` dtypes."""
    allowed = tuple(allowed)
    if value.dtype not in allowed:
        names = ", ".join(dtype_name(dtype) for dtype in allowed)
        fail(op, argument, f"have dtype {names}", dtype_name(value.dtype), error=TypeError)


def check_shape(op: str, argument: str, value: torch.Tensor, shape: tuple, spec: str) -> None:
    """Require ``value.shape == shape`` (``None`` fits any size).

    ``spec`` is what the text says, sizes of ``shape`` filled in by place: "[P] with P={0}". Filled
    in sooner, torch.compile would make a graph for each size.
    """
    fits = value.shape == shape or (
        value.dim() == len(shape)
        and all(want is None or size == want for size, want in zip(value.shape, shape, strict=True))
    )
    if not fits:
        fail(op, argument, f"have shape {spec.format(*shape)}", tuple(value.shape))


def check_same_device(op: str, named: dict[str, torch.Tensor | None]) -> None:
    """Require every given tensor on one device and name the two that differ."""
    first_name, first = next((name, t) for name, t in named.items() if t is not None)
    device = first.device
    for name, tensor in named.items():
        if tensor is not None and tensor.device != device:
            fail(op, name, f"be on {device} like {first_name}", str(tensor.device))


def check_positive_float(op: str, argument: str, value: Any) -> float:
    """Require a Python number that is finite and > 0; tensors are refused (they would sync)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(op, argument, "be a Python float > 0", type(value).__name__, error=TypeError)
    if not (value > 0 and is_finite(value)):
        fail(op, argument, "be a finite float > 0", value)
    return float(value)


def is_finite(value: float) -> bool:
    """``math.isfinite`` in a form that torch.compile traces where the number is a symbol."""
    return -math.inf < value < math.inf


def check_number(op: str, argument: str, value: Any) -> None:
    """Require a Python number; tensors are refused (they would sync)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(op, argument, "be a Python float", type(value).__name__, error=TypeError)


def check_parameters(
    op: str, values: dict[str, float], table: Iterable[Parameter]
) -> dict[str, float]:
    """Check every parameter against its range in the table, used by the types or not."""
    for parameter in table:
        value = values[parameter.name]
        if type(value) is float and parameter.low < value < parameter.high:
            # within both ends, whether they belong to the range or not
            continue
        check_number(op, parameter.name, value)
        if not parameter.holds(value):
            fail(op, parameter.name, parameter.requirement, value)
    return {name: float(value) for name, value in values.items()}


def check_choice(op: str, argument: str, value: Any, allowed: Iterable[str]) -> None:
    """Require one of the ``allowed`` strings."""
    allowed = tuple(allowed)
    if value not in allowed:
        names = ", ".join(repr(name) for name in sorted(allowed))
        fail(op, argument, f"be one of {names}", repr(value))


def refuse_double_backward(op: str) -> None:
    """Raise inside a backward that is itself being recorded (``create_graph=True``)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: once_differentiable: double backward unsupported. Call backward without "
            "create_graph=True."
        )
