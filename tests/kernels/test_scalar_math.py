"""Scalar functions of the kernels against fp64 math, over the whole range of fp32."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from spo_kernels.calls.backends import triton_interpreter_on  # noqa: E402
from spo_kernels.kernels.scalar_math import (  # noqa: E402
    expm1,
    log1p,
    sigmoid_and_slope,
    softplus_and_sigmoid,
    tanh,
    tanh_half,
)

if not triton_interpreter_on():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

BLOCK = 4096


@triton.jit
def _kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    softplus, sigmoid = softplus_and_sigmoid(x)
    also_sigmoid, slope = sigmoid_and_slope(x)
    tl.store(out_ptr + offs, log1p(x))
    tl.store(out_ptr + BLOCK + offs, expm1(x))
    tl.store(out_ptr + 2 * BLOCK + offs, softplus)
    tl.store(out_ptr + 3 * BLOCK + offs, sigmoid)
    tl.store(out_ptr + 4 * BLOCK + offs, also_sigmoid)
    tl.store(out_ptr + 5 * BLOCK + offs, slope)
    tl.store(out_ptr + 6 * BLOCK + offs, tanh_half(x))
    tl.store(out_ptr + 7 * BLOCK + offs, tanh(x))


def _run(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(8, x.numel())
    _kernel[(1,)](x_ptr=x, out_ptr=out, BLOCK=x.numel())
    return out


def test_relative_error():
    """At most a few ulp of the value, at every magnitude and sign and around the cuts."""
    half = BLOCK // 2
    magnitude = torch.logspace(-30, 1.9, half - 9)
    cuts = [0.5, 0.49999997, 0.50000006, 1.0, 0.99999994, 1.0000001, 80.0, 0.75, 0.625]
    x = torch.cat((magnitude, torch.tensor(cuts)))
    x = torch.cat((x, -x))
    out, exact = _run(x).double(), x.double()
    expected = {
        0: torch.log1p(exact),
        1: torch.expm1(exact),
        2: torch.nn.functional.softplus(exact, threshold=1000.0),
        3: torch.sigmoid(exact),
        4: torch.sigmoid(exact),
        5: torch.sigmoid(exact) * torch.sigmoid(-exact),
        6: torch.tanh(exact / 2),
        7: torch.tanh(exact),
    }
    for row, value in expected.items():
        # log1p ends at -1, where its own slope makes one ulp of 1 + x matter
        inside = exact > -0.999 if row == 0 else torch.ones_like(exact, dtype=torch.bool)
        error = ((out[row] - value).abs() / value.abs())[inside]
        assert error.max() <= 4e-7, (row, float(error.max()), float(x[inside][error.argmax()]))


def test_special_values():
    """Infinities have their limits, NaN stays, 0 is exact."""
    inf = float("inf")
    out = _run(torch.tensor([0.0, inf, -inf, float("nan"), 3e38, -3e38, -1.0, 1e-45]))
    log1p_row, expm1_row, softplus, sigmoid, also, slope, half, whole = out
    assert log1p_row[0] == 0 and log1p_row[1] == inf and log1p_row[6] == -inf
    assert expm1_row[0] == 0 and expm1_row[1] == inf and expm1_row[2] == -1 and expm1_row[5] == -1
    assert softplus[1] == inf and softplus[2] == 0 and softplus[4] == torch.tensor(3e38)
    assert sigmoid[:3].tolist() == also[:3].tolist() == [0.5, 1.0, 0.0]
    assert slope[:3].tolist() == [0.25, 0.0, 0.0]
    assert half[:3].tolist() == whole[:3].tolist() == [0.0, 1.0, -1.0]
    assert out[:, 3].isnan().all()
    assert not out[1:, [0, 1, 2, 4, 5, 6]].isnan().any()
