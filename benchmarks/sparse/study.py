"""``python -m benchmarks.sparse``: would a bounded sparse backward pay? Measured on the CPU.

Rows come from small models trained here on real preference pairs (responses they did not see,
responses they saw, and the same ones memorised) and from peaked random inputs. For every vocabulary
order and tolerance: the fraction f of tiles kept and the error of both gradients; the f at which
both errors meet the bf16 accuracy bar; CPU times of a plain sparse forward + backward beside our
exact strategies; and a DPO run on sparse gradients beside the exact one.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import results, timing, workloads
from benchmarks.results import Row
from benchmarks.sparse import backward, report
from benchmarks.sparse import model as text_model
from spo_kernels import linear_logprob, preference_loss

TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
ORDERS = ("shuffled", "token id", "frequency")
# exact plans, and whether the head trains
STRATEGIES = {"recompute": True, "resident": True, "direction": False}
_TIMED_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Setting:
    """The sizes of a run."""

    # the text holds 29,220 BPE tokens: the first size is as large as it allows
    vocabs: tuple[int, ...] = (29184, 16384, 4096)
    hidden: int = 128
    layers: int = 2
    pairs: int = 300
    epochs: int = 3
    memorised_epochs: int = 20
    rows: int = 4096
    rounds: int = 3
    steps: int = 200


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of one distribution, the head they are scored with, and what "frequency" sorts by."""

    name: str
    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [V, H]
    labels: torch.Tensor  # [N] int64
    upstream: torch.Tensor  # [N]
    counts: torch.Tensor  # [V]

    def in_order(self, name: str) -> "Source":
        """Return the same rows with the vocabulary in the named order."""
        order = torch.arange(len(self.weight))
        if name == "frequency":
            order = torch.argsort(self.counts, descending=True, stable=True)
        if name == "shuffled":
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
        labels = torch.argsort(order)[self.labels]
        return dataclasses.replace(self, weight=self.weight[order], labels=labels)


def text_source(name: str, model, pairs: list[text_model.Pair], counts, rows: int) -> Source:
    """Return the first rows of the pairs' responses, with DPO's gradient at its start.

    There the policy is the reference: the same size in every row, negative on chosen responses.
    """
    with torch.no_grad():
        hidden, labels, lengths = text_model.scored(model, pairs, 256, 512)
    upstream = torch.tensor([-0.05, 0.05] * len(pairs)).repeat_interleave(torch.tensor(lengths))
    weight = model.lm_head.weight.detach().clone()
    return Source(name, hidden[:rows], weight, labels[:rows], upstream[:rows], counts)


def random_source(rows: int, hidden: int, vocab: int) -> Source:
    """Return peaked random inputs; "frequency" is the best there is: mass on these very rows."""
    shape = workloads.Workload("sparse", rows, hidden, vocab, "fp32", peaked=True)
    made = workloads.make_tensors(shape, "cpu")
    inputs, weight = made.hidden.detach(), made.weight.detach()
    counts = sum(torch.softmax(part @ weight.T, -1).sum(0) for part in inputs.split(1024))
    return Source("peaked random", inputs, weight, made.labels, made.upstream, counts)


def measure_tiles(source: Source) -> Iterator[Row]:
    """Yield a row an order and tolerance, and those where both errors just meet the bar."""
    for order in ORDERS:
        measure = errors_of(source.in_order(order))
        found = {f"{tolerance:g}": measure(tolerance) for tolerance in TOLERANCES}
        if order == "frequency":
            found["bar"] = at_the_bar(measure, "rel_dh")
            found["bar, means added"] = at_the_bar(measure, "rel_dh_means")
        for name, row in found.items():
            about = {"kind": "tiles", "pass": f"{order} {name}", "order": order, "at": name}
            yield {**about, **_about(source), **row}


def errors_of(source: Source) -> Callable[[float], Row]:
    """Return a function of the tolerance: f, the bound, and errors against keeping every tile."""
    hidden, weight, labels, upstream = source.hidden, source.weight, source.labels, source.upstream
    saved = backward.forward(hidden, weight, labels)

    def gradients(keep: torch.Tensor):
        return backward.backward(hidden, weight, labels, saved.logsumexp, upstream, keep)

    def error(got: torch.Tensor, right: torch.Tensor) -> float:
        return ((got - right).norm() / right.norm()).item()

    exact = gradients(backward.select(saved, labels, upstream, 0.0).keep)

    def measure(tolerance: float) -> Row:
        keep, bound = backward.select(saved, labels, upstream, tolerance)
        grad_hidden, grad_weight = gradients(keep)
        means = backward.mean_part(weight, upstream, saved.q, keep)
        return {
            "tolerance": tolerance,
            "nll": -saved.logps.mean().item(),
            "fraction": keep.float().mean().item(),
            "bound": bound.item(),
            "rel_dh": error(grad_hidden, exact[0]),
            "rel_dh_means": error(grad_hidden + means, exact[0]),
            "rel_dw": error(grad_weight, exact[1]),
            "vocab_without_gradient": 1 - keep.any(0).float().mean().item(),
        }

    return measure


def at_the_bar(measure: Callable[[float], Row], hidden_error: str) -> Row:
    """Return the row of the largest tolerance that keeps both errors inside the bf16 bar."""
    low, high = -6.0, 0.0
    for _ in range(8):
        middle = (low + high) / 2
        row = measure(10**middle)
        inside = max(row[hidden_error], row["rel_dw"]) <= report.BAR
        low, high = (middle, high) if inside else (low, middle)
    return measure(10**low)


def measure_times(source: Source, rounds: int) -> Row:
    """Return CPU times of forward + backward: sparse in frequency order, and our exact plans."""
    source = source.in_order("frequency")
    hidden, weight, labels, upstream = source.hidden, source.weight, source.labels, source.upstream

    def sparse(need_weight: bool) -> None:
        saved = backward.forward(hidden, weight, labels)
        keep = backward.select(saved, labels, upstream, _TIMED_TOLERANCE).keep
        backward.backward(
            hidden, weight, labels, saved.logsumexp, upstream, keep, need_weight=need_weight
        )

    def exact(strategy: str, need_weight: bool) -> None:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(need_weight)]
        out = linear_logprob(*leaves, labels, strategy=strategy, budget_bytes=1 << 34)
        torch.autograd.grad(out.logps, leaves[: 1 + need_weight], upstream)

    runs = {"sparse trainable": lambda: sparse(True), "sparse frozen": lambda: sparse(False)}
    runs |= {name: (lambda n=name, h=head: exact(n, h)) for name, head in STRATEGIES.items()}
    times = timing.race(runs, rounds=rounds)
    medians = {name: timing.summary(values)["median_ms"] for name, values in times.items()}
    about = {"kind": "time", "pass": "forward_backward", **_about(source), "rounds": rounds}
    return {**about, "tolerance": _TIMED_TOLERANCE, "median_ms": medians}


def measure_curve(model, pairs: list[text_model.Pair], counts, steps: int) -> Iterator[Row]:
    """Yield the losses of DPO on exact and on sparse gradients: same model, same batches."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    order = torch.argsort(counts, descending=True, stable=True)

    def batch_logps(step: int, tolerance: float, fractions: list[float]) -> torch.Tensor:
        first = 2 * step % len(pairs)
        hidden, labels, lengths = text_model.scored(model, pairs[first : first + 2], 128, 128)
        logps = backward.log_probs(
            hidden, model.lm_head.weight, labels, order, tolerance, fractions
        )
        return torch.stack([part.sum() for part in logps.split(lengths)])

    with torch.no_grad():
        reference = [batch_logps(step, 0.0, []) for step in range(min(steps, len(pairs) // 2))]
    for tolerance in (0.0, 1e-1, 1e-2):
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
        losses, fractions = [], []
        for step in range(steps):
            before = reference[step % len(reference)]
            logps = batch_logps(step, tolerance, fractions)
            out = preference_loss(logps[::2], logps[1::2], before[::2], before[1::2], beta=0.1)
            loss = out.losses.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(round(loss.item(), 6))
        yield {
            "kind": "curve",
            "workload": f"dpo V {len(counts)}",
            "provider": "sparse" if tolerance else "exact",
            "pass": f"{tolerance:g}",
            "vocab": len(counts),
            "fraction": sum(fractions) / len(fractions),
            "losses": losses,
        }
    model.load_state_dict(start)


def _about(source: Source) -> Row:
    V, H = source.weight.shape
    return {
        "workload": f"{source.name} V {V}",
        "source": source.name,
        "provider": "sparse",
        "rows": len(source.labels),
        "hidden": H,
        "vocab": V,
    }


def stages(setting: Setting, pairs: Path) -> Iterator[list[Row]]:
    """Yield the rows of each source as they are measured, and the curve at the first V.

    ``pairs`` is the file of preference pairs that the models are trained on.
    """

    def measure(source: Source) -> list[Row]:
        return [*measure_tiles(source), measure_times(source, setting.rounds)]

    yield measure(random_source(setting.rows, setting.hidden, setting.vocabs[0]))
    for vocab in setting.vocabs:
        corpus = text_model.read_corpus(pairs, vocab, setting.pairs)
        few, counts = corpus.seen[:16], corpus.counts
        model = text_model.make_model(vocab, setting.hidden, setting.layers)
        text_model.train(model, corpus.seen, setting.epochs)
        yield measure(text_source("unseen text", model, corpus.unseen[:16], counts, setting.rows))
        yield measure(text_source("seen text", model, few, counts, setting.rows))
        if vocab == setting.vocabs[0]:
            yield list(measure_curve(model, few, counts, setting.steps))
        text_model.train(model, few, setting.memorised_epochs)
        yield measure(text_source("memorised text", model, few, counts, setting.rows))


def main(arguments: list[str] | None = None) -> int:
    """Run the study, write its result file, the README's table and the plot."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sparse", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        required=True,
        help="JSONL file of preference pairs: prompt, chosen and rejected as lists of messages",
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    if not options.pairs.is_file():
        parser.error(f"--pairs: there is no file {options.pairs}")
    torch.set_num_threads(options.threads)
    path = report.FOLDER / results.path_for("cpu", options.threads).name
    for rows in stages(Setting(), options.pairs):
        print(rows[0]["workload"], flush=True)
        rows = [{"command": "python -m benchmarks.sparse", **row} for row in rows]
        results.merge(path, rows, device="cpu", threads=options.threads)
    return report.publish()
