"""The sparse study on toy sizes: its gradients, its bound, its criterion, its README table."""

import dataclasses

import pytest
import torch

from benchmarks import results
from benchmarks.sparse import backward, report, study
from benchmarks.sparse.backward import BLOCK_N, BLOCK_V

_TINY = study.Setting(
    vocabs=(512,),
    hidden=16,
    layers=1,
    pairs=40,
    epochs=1,
    memorised_epochs=1,
    rows=BLOCK_N,
    rounds=1,
    steps=2,
)
_PAIRS = results.ROOT / "integrations" / "command" / "demo_pairs.jsonl"
_TILES = (2, BLOCK_N, 4, BLOCK_V)


def _peaked() -> study.Source:
    return study.random_source(2 * BLOCK_N, 32, 4 * BLOCK_V)


def _adversarial() -> study.Source:
    """Almost uniform, every label in the first tile, and half the rows count not."""
    source = _peaked()
    upstream = source.upstream.clone()
    upstream[::2] = 0.0
    labels = torch.arange(2 * BLOCK_N) % BLOCK_V
    return dataclasses.replace(
        source, labels=labels, upstream=upstream, weight=source.weight * 1e-2
    )


def _dense(source: study.Source) -> torch.Tensor:
    """G [N, V] in fp64."""
    p = (source.hidden.double() @ source.weight.double().T).softmax(-1)
    onehot = torch.nn.functional.one_hot(source.labels, len(source.weight))
    return source.upstream.double()[:, None] * (onehot - p)


def _forward(source: study.Source) -> backward.Forward:
    return backward.forward(source.hidden, source.weight, source.labels)


@pytest.mark.parametrize("make", [_peaked, _adversarial])
@pytest.mark.parametrize("tolerance", [3.0, 0.3, 1e-1, 1e-2])
def test_what_is_dropped_stays_in_the_bound(make, tolerance):
    source = make().in_order("frequency")
    keep, bound = backward.select(_forward(source), source.labels, source.upstream, tolerance)
    exact = _dense(source)
    dropped = exact.view(_TILES) * ~keep[:, None, :, None]
    ratio = (dropped.norm() / exact.norm()).item()
    assert ratio <= bound.item() * (1 + 1e-5) <= tolerance * (1 + 1e-4)
    # p2 is rounded up by less than 2
    assert bound.item() <= ratio * 2**0.5 * (1 + 1e-4)


def test_selection():
    source = _adversarial()
    # p^2 sums to 2^-12 a tile and row, so 8 tiles of about 2^-13 |G|^2 each: kept below 2^-5 or so
    only_label, every = [True, False, False, False], [True] * 4
    for tolerance, line in ((3.0, only_label), (0.06, only_label), (0.02, every), (0.0, every)):
        found = backward.select(_forward(source), source.labels, source.upstream, tolerance)
        assert found.keep.tolist() == [line] * 2


def test_gradients():
    source = _peaked()
    keep = torch.tensor([[True, False, True, True], [True, True, False, False]])
    lse = _forward(source).logsumexp
    inputs = (source.hidden, source.weight, source.labels, lse, source.upstream, keep)
    got = backward.backward(*inputs)
    G = (_dense(source).view(_TILES) * keep[:, None, :, None]).view(2 * BLOCK_N, -1)
    right = (G @ source.weight.double(), G.T @ source.hidden.double())
    for found, expected in zip(got, right, strict=True):
        assert (found - expected).norm() <= 2e-6 * expected.norm()
    frozen = backward.backward(*inputs, need_weight=False)
    assert torch.equal(frozen[0], got[0]) and frozen[1] is None


def test_means_stand_in_for_dropped_tiles():
    source = _peaked()
    # where every row of a tile is the same, its mean is exact
    weight = source.weight[::BLOCK_V].repeat_interleave(BLOCK_V, 0)
    source = dataclasses.replace(source, weight=weight, labels=source.labels % BLOCK_V)
    saved = _forward(source)
    inputs = (source.hidden, weight, source.labels, saved.logsumexp, source.upstream)
    keep = torch.tensor([[True, False, True, False]] * 2)
    got = backward.backward(*inputs, keep)[0]
    got += backward.mean_part(weight, source.upstream, saved.q, keep)
    assert torch.allclose(got, backward.backward(*inputs, keep | True)[0], atol=1e-5)


def test_log_probs_without_a_tolerance_are_exact():
    source, count = _peaked(), 2 * BLOCK_N - 3
    labels = source.labels[:count]
    order = torch.randperm(len(source.weight), generator=torch.Generator().manual_seed(1))
    fractions = []
    runs = {
        "sparse": lambda h, w: backward.log_probs(h, w, labels, order, 0.0, fractions),
        "torch": lambda h, w: (h @ w.T).log_softmax(-1).gather(1, labels[:, None])[:, 0],
    }
    found = {}
    for name, run in runs.items():
        leaves = [source.hidden[:count].clone().requires_grad_()]
        leaves.append(source.weight.clone().requires_grad_())
        logps = run(*leaves)
        found[name] = (logps, *torch.autograd.grad(logps, leaves, source.upstream[:count]))
    for got, right in zip(*found.values(), strict=True):
        assert torch.allclose(got, right, atol=2e-5)
    assert fractions == [1.0]


def test_the_bar_is_met_and_no_larger_tolerance_would():
    # errors grow with the tolerance: grad_hidden meets the bar to 1e-3
    row = study.at_the_bar(lambda t: {"tolerance": t, "rel_dh": 2.7 * t, "rel_dw": t}, "rel_dh")
    assert 0.9e-3 < row["tolerance"] <= 1e-3
    assert row["rel_dh"] <= report.BAR


def test_break_even_is_where_the_prediction_is_one():
    for place, plan in enumerate(study.STRATEGIES):
        f = report.break_even(plan)
        assert 0 < f < 1 and report.predicted_ratios(f)[place] == pytest.approx(1.0)
    # the promise: 0.25 + 0.85 f of recompute
    assert report.predicted_ratios(0.5)[0] == pytest.approx(0.25 + 0.85 * 0.5)


def test_study_and_readme(tmp_path):
    rows = [row for part in study.stages(_TINY, _PAIRS) for row in part]
    tiles = [row for row in rows if row["kind"] == "tiles"]
    assert {row["source"] for row in tiles} == set(report._COLORS)
    assert all(row["bound"] <= row["tolerance"] * 1.0001 for row in tiles)
    at_bar = [row for row in tiles if row["at"] == "bar"]
    assert len(at_bar) == 4 and all(row["rel_dh"] <= report.BAR for row in at_bar)
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{report.BEGIN}\nold\n{report.END}\nb\n")
    results.merge(tmp_path / "toy.json", rows, device="cpu", threads=1)
    assert report.publish(readme, tmp_path) == 0
    text = readme.read_text()
    assert text.startswith("a\n") and text.endswith("\nb\n") and "old" not in text
    assert "| memorised text V 512 |" in text and "DPO, 2 steps, V 512" in text
    assert (tmp_path / "sparse-study.png").stat().st_size > 10_000


def test_readme_holds_the_newest_result():
    assert report.render(report.newest()) in report.README.read_text("utf-8")
