"""State of one ``linear_logprob`` call: settings, plan and scored rows, as backends take them."""

import dataclasses
from typing import NamedTuple

import torch
import torch.distributed as dist

from spo_kernels.calls.plan import Plan


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which rows of a head that is split over a group this rank holds."""

    group: dist.ProcessGroup
    start: torch.Tensor  # [] int64
    total: torch.Tensor  # [] int64, V of the whole head
    differs: torch.Tensor  # [] bool, whether the ranks have other labels than each other


class Settings(NamedTuple):
    """A checked call's own wishes; the logits are ``cap(z0 * logit_scale) / temperature``."""

    backend: str
    compute_dtype: torch.dtype
    needs_grad: frozenset[str]
    outputs: frozenset[str] = frozenset({"logps"})
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    strategy: str = "auto"
    budget_bytes: int | None = None

    @property
    def slope(self) -> float:
        """dz/dz0 without the softcap's ``1 - tanh^2``."""
        return self.logit_scale / self.temperature

    def target_slope(self, target_logit: torch.Tensor) -> torch.Tensor | float:
        """dz/dz0 at a logit z: ``slope * (1 - tanh^2)``, tanh read back from z itself."""
        if self.softcap is None:
            return self.slope
        tanh = target_logit * (self.temperature / self.softcap)
        return self.slope * (1.0 - tanh * tanh)


@dataclasses.dataclass(frozen=True)
class Call:
    """Non-tensor state of a call: its wishes, the plan for them, and a rank's rows of the head."""

    settings: Settings
    plan: Plan
    shard: Shard | None = None

    @property
    def absent_logit(self) -> float:
        """The logit of a label outside the head: wrong, or another rank's."""
        return float("nan") if self.shard is None else float("-inf")

    def whole_vocab(self, width: int) -> int | torch.Tensor:
        """Return V of the whole head; ``width`` is that of the weight at hand."""
        return width if self.shard is None else self.shard.total


@dataclasses.dataclass(frozen=True)
class Rows:
    """The scored rows of ``[..., *]`` tensors, gathered a chunk at a time.

    ``index`` is one index tensor per leading axis, or None when every row is scored.
    """

    count: int
    shape: torch.Size
    index: tuple[torch.Tensor, ...] | None

    def take(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start:stop`` as ``[stop - start, *]``; a view where nothing is dropped."""
        if self.index is None:
            return tensor.reshape(-1, *tensor.shape[len(self.shape) :])[start:stop]
        return tensor[tuple(axis[start:stop] for axis in self.index)]

    def put(self, tensor: torch.Tensor, start: int, stop: int, value: torch.Tensor) -> None:
        """Write rows ``start:stop`` of a contiguous ``[..., *]`` tensor."""
        if self.index is None:
            tensor.view(-1, *tensor.shape[len(self.shape) :])[start:stop] = value
        else:
            tensor[tuple(axis[start:stop] for axis in self.index)] = value.to(tensor.dtype)

    def put_all(self, tensor: torch.Tensor, value: torch.Tensor, step: int) -> None:
        """Write every scored row, ``step`` at a time: a cast copy is never whole."""
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            self.put(tensor, start, stop, value[start:stop])

    def take_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every scored row."""
        return self.take(tensor, 0, self.count)

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """Return ``[N]`` row values in the labels' shape, 0 where a row was dropped."""
        if self.index is None:
            # a copy: an output must not be a view of what is kept for the backward
            return value.view(self.shape).clone()
        out = value.new_zeros(self.shape)
        out[self.index] = value
        return out


class Inputs(NamedTuple):
    """The tensors of a call; ``labels`` are the scored rows' only."""

    hidden: torch.Tensor  # [..., H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    lora_a: torch.Tensor | None  # [..., R]
    lora_b: torch.Tensor | None  # [V, R]
    labels: torch.Tensor  # [N] int64, relative to the weight's first row

    def owns_label(self) -> torch.Tensor:
        """Return ``[N]`` whether a row's label is one of this weight's rows."""
        return (self.labels >= 0) & (self.labels < self.weight.shape[0])


class Kept(NamedTuple):
    """Kept by a forward for its backward; fields that a strategy does not use are None."""

    target_logit: torch.Tensor  # [N] fp32
    logsumexp: torch.Tensor  # [N] fp32
    rest: torch.Tensor  # [N] fp32, 1 - p_label without cancellation
    entropy: torch.Tensor | None = None  # [N] fp32
    direction: torch.Tensor | None = None  # [N, H] d logps / d hidden
    direction_lora: torch.Tensor | None = None  # [N, R] d logps / d lora_a
    direction_scale: torch.Tensor | None = None  # [2, N] fp32, row scales of the two directions
    exps: torch.Tensor | None = None  # [N, V] exponentials
    exp_reference: torch.Tensor | None = None  # reference of exps, see each backend
    share: torch.Tensor | None = None  # [N] fp32, this rank's share of the softmax

    def label_probs(self) -> torch.Tensor:
        """Return ``[N]`` p_label."""
        return torch.exp(self.target_logit - self.logsumexp)


class RowGrads(NamedTuple):
    """Upstream gradients of the scored rows, ``[N]`` each, None where none arrived."""

    logps: torch.Tensor | None
    entropy: torch.Tensor | None
    logsumexp: torch.Tensor | None
    mean_logits: torch.Tensor | None


class RowCoefficients(NamedTuple):
    """Row vectors of d loss / d z0, ``[N]`` each.

    grad_v = (on_p p_v - g_entropy p_v (log p_v + entropy) + everywhere) * slope_v
    grad_y = on_label
    """

    on_p: torch.Tensor
    on_label: torch.Tensor
    g_entropy: torch.Tensor | None
    entropy: torch.Tensor | None
    everywhere: torch.Tensor | None
