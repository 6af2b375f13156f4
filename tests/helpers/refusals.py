"""A caller's mistake and the whole sentence it gets, one parametrised case for each."""

from typing import Any

import pytest
import torch

REFUSAL = ("error", "text", "args", "settings")


def refusal(error: type[Exception], text: str, *args: Any, **settings: Any) -> Any:
    """Return the parameters ``REFUSAL`` of one case.

    ``{device}`` in the text stands for the device that the tensors are moved to.
    """
    # pytest numbers ids that repeat
    return pytest.param(error, text, args, settings, id=text[:60])


def assert_refused(op, backend, error, text, args, settings) -> None:
    """Call an op with tensors on the backend's device; its sentence is ``text`` to the letter."""
    name, device = backend

    def move(value):
        # what is on no device stays there: that is the mistake
        is_real = isinstance(value, torch.Tensor) and value.device.type != "meta"
        return value.to(device) if is_real else value

    on_device = str(torch.empty(0, device=device).device)
    with pytest.raises(error) as raised:
        op(*map(move, args), **{"backend": name, **{k: move(v) for k, v in settings.items()}})
    assert str(raised.value) == f"{op.__name__}: {text.replace('{device}', on_device)}"


def assert_no_fp64_on_triton(op, backend, tensors, *fields) -> None:
    """``fields`` in fp64 are refused by the triton backend, the first of them by name."""
    if backend[0] == "torch":
        pytest.skip("takes fp64")
    given = {**tensors, **{field: tensors[field].double() for field in fields}}
    text = (
        f"{fields[0]} must have dtype bfloat16, float16, float32 on backend='triton', "
        "got float64. Use backend='torch'."
    )
    assert_refused(op, backend, TypeError, text, (), given)
