"""``spo_kernels.tune``: the rates are those that made the times, on a GPU they are plausible."""

import dataclasses

import pytest
import torch

from spo_kernels import tune
from spo_kernels.calls import layout
from spo_kernels.calls.backends import triton_interpreter_on


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


@pytest.mark.alone
@pytest.mark.gpu
def test_measure_on_a_gpu(cuda_device):
    flops, bandwidth = tune.fit(tune.measure(cuda_device))
    assert 1e12 < flops < 1e16 and 1e10 < bandwidth < 1e14


def test_race_tiles(monkeypatch):
    """Every raced tile runs in its row, and the table is as it was."""
    if not triton_interpreter_on():
        pytest.skip("needs the interpreter (make test runs it so)")
    from spo_kernels.kernels import linear_logprob_bwd, linear_logprob_fwd
    from spo_kernels.kernels.tiles import RACED, TILES

    ran = {"fwd": [], "bwd": []}
    for module, name, kind in (
        (linear_logprob_fwd, "linear_logprob_fwd", "fwd"),
        (linear_logprob_bwd, "linear_logprob_bwd_logits", "bwd"),
    ):
        launch = getattr(module, name)

        def recorded(*args, launch=launch, kind=kind, **settings):
            ran[kind].append(settings["tile"])
            return launch(*args, **settings)

        monkeypatch.setattr(module, name, recorded)
    monkeypatch.setattr(tune, "_ROUNDS", 1)
    before, tiles = dict(TILES), RACED["sm_80", "pointer"]
    times = tune.race_tiles(torch.device("cpu"), shapes=((5, 16, 300),))
    assert before == TILES
    assert [(t.key, t.tile) for t in times] == [
        ((kind, "sm_80", "half", "pointer"), tile) for kind in ran for tile in tiles
    ]
    assert all(set(tiles) <= set(launched) for launched in ran.values())


def test_race_engines(monkeypatch):
    """Our kernel runs for its own time and not for the library's; the threshold is as it was."""
    if not triton_interpreter_on():
        pytest.skip("needs the interpreter (make test runs it so)")
    from spo_kernels.kernels import linear_logprob_bwd_weight

    launches, launch = [], linear_logprob_bwd_weight.linear_logprob_bwd_weight

    def recorded(grad, *args, **settings):
        launches.append((len(grad), layout.WEIGHT_KERNEL_ROWS))
        launch(grad, *args, **settings)

    monkeypatch.setattr(linear_logprob_bwd_weight, "linear_logprob_bwd_weight", recorded)
    monkeypatch.setattr(tune, "_ROUNDS", 1)
    before = layout.WEIGHT_KERNEL_ROWS
    found = tune.race_engines(torch.device("cpu"), rows=(3, 5), sizes=(16, 300))
    assert [row[0] for row in found] == [3, 5]
    # never with a threshold of 0, which is the library's turn
    assert set(launches) == {(3, 3), (5, 5)}
    assert before == layout.WEIGHT_KERNEL_ROWS
