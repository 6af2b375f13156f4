"""Scalar functions that lose no digits near 0 and never overflow: compiled and interpreted alike.

``libdevice`` has them only for compiled kernels. Everything is fp32 and elementwise; a NaN stays
one. Series are cut where the next term is below 2e-9 of the value, far under fp32's 6e-8.
"""

import triton
import triton.language as tl


@triton.jit
def _log1p_series(x):
    # log(1 + x) = 2 atanh(x / (2 + x)); for x in [-1/2, 1] the argument is at most 1/3
    t = x / (2.0 + x)
    square = t * t
    series = 1.0 / 15.0
    for i in tl.static_range(7):
        series = series * square + 1.0 / (13.0 - 2.0 * i)
    return 2.0 * t * series


@triton.jit
def log1p(x):
    """log(1 + x) for x >= -1."""
    is_near = (x >= -0.5) & (x <= 1.0)
    return tl.where(is_near, _log1p_series(tl.where(is_near, x, 0.0)), tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """exp(x) - 1."""
    is_near = tl.abs(x) < 0.5
    near = tl.where(is_near, x, 0.0)
    series = 1.0
    for i in tl.static_range(8):
        series = series * near * (1.0 / (9.0 - i)) + 1.0
    return tl.where(is_near, near * series, tl.exp(x) - 1.0)


@triton.jit
def softplus_and_sigmoid(x):
    """(log(1 + exp(x)), 1 / (1 + exp(-x))) from one exponential that cannot overflow."""
    small = tl.exp(-tl.abs(x))
    softplus = tl.where(x > 0.0, x, 0.0) + _log1p_series(small)
    return softplus, tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def tanh_half(x):
    """tanh(x / 2) = 2 / (1 + exp(-x)) - 1."""
    decay = -tl.abs(x)
    t = -expm1(decay) / (1.0 + tl.exp(decay))
    return tl.where(x < 0.0, -t, t)


@triton.jit
def tanh(x):
    """tanh(x) for every logit of a tile: one exponential and a short series, of Cephes' tanhf."""
    # 2 log2(e): exp(2 |x|) is a power of 2
    large = 1.0 - 2.0 / (1.0 + tl.exp2(tl.abs(x) * 2.8853900817779268))
    large = tl.where(x < 0.0, -large, large)
    square = x * x
    series = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
    series = tl.fma(square, series, -5.37397155531e-2)
    series = tl.fma(square, series, 1.33314422036e-1)
    series = tl.fma(square, series, -3.33332819422e-1)
    return tl.where(tl.abs(x) < 0.625, tl.fma(square * series, x, x), large)


@triton.jit
def sigmoid_and_slope(x):
    """(1 / (1 + exp(-x)), its derivative), neither losing the digits of a tiny value."""
    small = tl.exp(-tl.abs(x))
    one_plus = 1.0 + small
    return tl.where(x >= 0.0, 1.0, small) / one_plus, small / (one_plus * one_plus)
