"""``spo_kernels.tune``: the rates are those that made the times, on a GPU they are plausible."""

import dataclasses

import pytest
import torch

from spo_kernels import tune


def made_points(flops, bandwidth, noise=0.0):
    points = []
    for index, (flop, moved) in enumerate([(1e11, 1e8), (4e11, 2e9), (2e10, 9e8)]):
        point = tune.Point("score", 1, 1, 1, flop, moved, 0.0)
        factor = 1.0 + noise * (-1) ** index
        exact = point.predicted_ms(flops, bandwidth)
        points.append(dataclasses.replace(point, measured_ms=exact * factor))
    return points


def test_fit():
    assert tune.fit(made_points(2e11, 1e10)) == pytest.approx((2e11, 1e10), rel=1e-6)
    assert tune.fit(made_points(2e11, 1e10, noise=0.02)) == pytest.approx((2e11, 1e10), rel=0.1)


def test_fit_refuses_times_that_no_rates_explain():
    points = [
        tune.Point("score", 1, 1, 1, 1e11, 1e8, 100.0),
        tune.Point("score", 1, 1, 1, 1e11, 9e8, 50.0),
    ]
    with pytest.raises(ValueError, match="tune: times must grow with products and bytes"):
        tune.fit(points)


def test_measure():
    points = tune.measure(torch.device("cpu"), shapes=((64, 32, 600),))
    assert [point.strategy for point in points] == ["score", "direction", "recompute"]
    assert [point.flop for point in points] == [n * 2.0 * 64 * 32 * 600 for n in (1, 2, 4)]
    assert all(point.measured_ms > 0 for point in points)


@pytest.mark.gpu
def test_measure_on_a_gpu(cuda_device):
    flops, bandwidth = tune.fit(tune.measure(cuda_device))
    assert 1e12 < flops < 1e16 and 1e10 < bandwidth < 1e14
