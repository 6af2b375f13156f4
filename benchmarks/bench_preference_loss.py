"""``preference_loss`` of token log-probs beside the same losses in plain torch, as TRL writes them.

Both get the same ``[P, T]`` token log-probs and masks, and the reference's ``[P]`` sums, which TRL
computes before training; both return losses and rewards, and the gradients of the token log-probs.
On a CPU with one thread.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from benchmarks import timing
from benchmarks.results import Row
from spo_kernels import preference_loss
from spo_kernels.reference.preference_loss import preference_loss_reference

# loss types of each case, summed where there are several
CASES = {
    "sigmoid": ("sigmoid",),
    "sigmoid+sft": ("sigmoid", "sft"),
    "ipo": ("ipo",),
    "discopop": ("discopop",),
    "simpo": ("simpo",),
    "aot": ("aot",),
}
_BETA, _DISCOPOP_TAU, _SIMPO_GAMMA = 0.1, 0.05, 0.5


@dataclasses.dataclass(frozen=True)
class PairShape:
    """P pairs of up to T tokens, and how many steps are timed as one."""

    shape: str
    pairs: int
    tokens: int
    steps: int

    def workload(self, case: str) -> str:
        return f"preference_loss-{case}-p{self.pairs}-t{self.tokens}"


BAR = PairShape("bar", 16, 512, steps=50)
TINY = PairShape("tiny", 3, 7, steps=2)


class Tensors(NamedTuple):
    """What both sides of the race are given; the names are those of ``preference_loss``."""

    chosen_logps: torch.Tensor  # [P, T]
    rejected_logps: torch.Tensor  # [P, T]
    ref_chosen_logps: torch.Tensor  # [P]
    ref_rejected_logps: torch.Tensor  # [P]
    chosen_mask: torch.Tensor  # [P, T] bool: the completion's tokens
    rejected_mask: torch.Tensor  # [P, T] bool

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.chosen_logps, self.rejected_logps


@pytest.mark.parametrize("case", CASES)
def test_preference_loss(benchmark, record, setting, case) -> None:
    shape = TINY if setting.tiny else BAR
    runs = make_runs(case, shape, setting.device)
    times = {name: [] for name in runs}

    def one_round() -> None:
        for name, run in runs.items():
            times[name].append(timing.time_once(run, setting.device))

    benchmark.group = shape.workload(case)
    # no work here fills a second thread, but eager's logsigmoid wakes one, and where the cores are
    # busy it waits milliseconds for it
    torch.set_num_threads(1)
    # a round is short: many of them outlast a neighbour's burst
    benchmark.pedantic(one_round, rounds=setting.rounds * shape.steps, warmup_rounds=1)
    torch.set_num_threads(setting.threads)
    times = {name: values[1:] for name, values in times.items()}
    for row in rows_of(case, shape, times, setting.device):
        record(**row)


def make_tensors(shape: PairShape, device: str) -> Tensors:
    """Return padded completions of different lengths, each with a prompt that does not count."""
    P, T = shape.pairs, shape.tokens
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(T)

    def of_side() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logps = -2.0 * torch.rand(P, T, generator=generator)
        starts = torch.randint(0, T // 4 + 1, (P, 1), generator=generator)
        ends = torch.randint(T // 2, T + 1, (P, 1), generator=generator)
        mask = (places >= starts) & (places < ends)
        ref = (logps * mask).sum(1) + torch.randn(P, generator=generator)
        return logps.to(device).requires_grad_(), ref.to(device), mask.to(device)

    (chosen, ref_chosen, chosen_mask), (rejected, ref_rejected, rejected_mask) = (
        of_side() for _ in range(2)
    )
    return Tensors(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask)


def settings_of(case: str, tensors: Tensors) -> dict:
    """Return the keywords of ``preference_loss`` and of its reference."""
    found = {**tensors._asdict(), "loss_type": CASES[case], "beta": _BETA}
    if case == "simpo":
        # it has no reference model
        found |= {"ref_chosen_logps": None, "ref_rejected_logps": None}
    return {**found, "discopop_tau": _DISCOPOP_TAU, "simpo_gamma": _SIMPO_GAMMA}


def eager_losses(case: str, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return losses and both rewards in plain torch."""
    chosen_logps = (tensors.chosen_logps * tensors.chosen_mask).sum(1)
    rejected_logps = (tensors.rejected_logps * tensors.rejected_mask).sum(1)
    c, r = chosen_logps, rejected_logps
    if case != "simpo":
        c, r = c - tensors.ref_chosen_logps, r - tensors.ref_rejected_logps
    if case == "aot":
        policy = torch.sort(chosen_logps - rejected_logps).values
        ref = torch.sort(tensors.ref_chosen_logps - tensors.ref_rejected_logps).values
        losses = -F.logsigmoid(_BETA * (policy - ref))
    elif case in ("ipo", "simpo"):
        per_token = c / _length(tensors.chosen_mask) - r / _length(tensors.rejected_mask)
        if case == "ipo":
            losses = (per_token - 1 / (2 * _BETA)) ** 2
        else:
            losses = -F.logsigmoid(_BETA * per_token - _SIMPO_GAMMA)
    elif case == "discopop":
        logits = _BETA * (c - r)
        blend = torch.sigmoid(logits / _DISCOPOP_TAU)
        losses = -F.logsigmoid(logits) * (1 - blend) + torch.exp(-logits) * blend
    else:
        losses = -F.logsigmoid(_BETA * (c - r))
    if case == "sigmoid+sft":
        losses = losses - chosen_logps.sum() / tensors.chosen_mask.sum()
    return losses, _BETA * c.detach(), _BETA * r.detach()


def _length(mask: torch.Tensor) -> torch.Tensor:
    return mask.sum(1).clamp(min=1)


def forwards_of(case: str, tensors: Tensors) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what gives the losses: plain torch and ours."""
    settings = settings_of(case, tensors)
    return {
        "eager": lambda: eager_losses(case, tensors)[0],
        "spo": lambda: preference_loss(**settings).losses,
    }


def make_runs(case: str, shape: PairShape, device: str) -> dict[str, Callable[[], None]]:
    """Return the callables to race, ``shape.steps`` steps each, after the gate against fp64."""
    tensors = make_tensors(shape, device)
    forwards = forwards_of(case, tensors)
    gate(case, tensors, forwards)

    def steps(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(shape.steps):
                _step(forward(), tensors)

        return run

    return {name: steps(forward) for name, forward in forwards.items()}


def gate(case: str, tensors: Tensors, forwards: dict[str, Callable[[], torch.Tensor]]) -> None:
    """Require the reference's batch loss and gradients in fp64 of every racer."""
    doubles = Tensors(*(t.detach().double() if t.is_floating_point() else t for t in tensors))
    for leaf in doubles.leaves:
        leaf.requires_grad_()
    truth = _step(preference_loss_reference(**settings_of(case, doubles))["losses"], doubles)
    for name, forward in forwards.items():
        step = _step(forward(), tensors)
        for what, found, wanted in zip(("loss", "chosen", "rejected"), step, truth, strict=True):
            error = float((found.double() - wanted).abs().max() / wanted.abs().max())
            # discopop of fp32 sums is eager's worst
            limit = 1e-5 if name == "spo" else 1e-3
            assert error <= limit, f"{name} on {case}: relative error of {what} is {error:.1e}"


def _step(losses: torch.Tensor, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    """Return the batch loss and the gradients of the log-probs."""
    loss = losses.mean()
    return loss.detach(), *torch.autograd.grad(loss, tensors.leaves)


def rows_of(case: str, shape: PairShape, times: dict[str, list[float]], device: str) -> list[Row]:
    """Return a row for each racer from its times of ``shape.steps`` steps; ours with its ratio."""
    rows = []
    for name, values in times.items():
        row = {"kind": "pairs", "workload": shape.workload(case), "case": case}
        row |= {"shape": shape.shape, "device": device.partition(":")[0], "provider": name}
        rows.append({**row, **timing.summary([value / shape.steps for value in values])})
    by_provider = {row["provider"]: row for row in rows}
    ratio = by_provider["spo"]["median_ms"] / by_provider["eager"]["median_ms"]
    by_provider["spo"] |= {"ratio": round(ratio, 4), "note": f"{ratio:.3f}x eager"}
    return rows
