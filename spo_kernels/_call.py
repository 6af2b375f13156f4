"""What one ``linear_logprob`` call hands to a backend: its settings and its scored rows."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which rows of a head that is split over a group this rank holds."""

    group: dist.ProcessGroup
    start: torch.Tensor  # [] int64
    total: torch.Tensor  # [] int64, V of the whole head
    differs: torch.Tensor  # [] bool, whether the ranks have other labels than each other


@dataclasses.dataclass(frozen=True)
class Call:
    """Non-tensor state of a call; the logits are ``cap(z0 * logit_scale) / temperature``."""

    backend: str
    strategy: str
    row_chunk: int
    vocab_chunk: int
    outputs: frozenset[str]
    needs_grad: frozenset[str]
    compute_dtype: torch.dtype
    temperature: float
    logit_scale: float
    softcap: float | None
    shard: Shard | None = None

    @property
    def absent_logit(self) -> float:
        """The logit of a label outside the head: wrong, or another rank's."""
        return float("nan") if self.shard is None else float("-inf")

    @property
    def slope(self) -> float:
        """dz/dz0 without the softcap's ``1 - tanh^2``."""
        return self.logit_scale / self.temperature

    def whole_vocab(self, width: int) -> int | torch.Tensor:
        """Return V of the whole head; ``width`` is that of the weight at hand."""
        return width if self.shard is None else self.shard.total

    def target_slope(self, target_logit: torch.Tensor) -> torch.Tensor | float:
        """dz/dz0 at a logit z: ``slope * (1 - tanh^2)``, tanh read back from z itself."""
        if self.softcap is None:
            return self.slope
        tanh = target_logit * (self.temperature / self.softcap)
        return self.slope * (1.0 - tanh * tanh)


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
    lora_a: torch.Tensor | None  # [..., r]
    lora_b: torch.Tensor | None  # [V, r]
    labels: torch.Tensor  # [N] int64, relative to the weight's first row

    def owns_label(self) -> torch.Tensor:
        """Return ``[N]`` whether a row's label is one of this weight's rows."""
        return (self.labels >= 0) & (self.labels < self.weight.shape[0])


class Kept(NamedTuple):
    """What a forward keeps for its backward; fields a strategy does not use are None."""

    target_logit: torch.Tensor  # [N] fp32
    logsumexp: torch.Tensor  # [N] fp32
    rest: torch.Tensor  # [N] fp32, 1 - p_label without cancellation
    entropy: torch.Tensor | None = None  # [N] fp32
    direction: torch.Tensor | None = None  # [N, H] d logps / d hidden
    direction_lora: torch.Tensor | None = None  # [N, r] d logps / d lora_a
    direction_scale: torch.Tensor | None = None  # [2, N] fp32, row scales of the two directions
    exps: torch.Tensor | None = None  # [N, V] exponentials
    exp_reference: torch.Tensor | None = None  # what exps are relative to, see each backend
    share: torch.Tensor | None = None  # [N] fp32, this rank's part of the softmax

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


def row_coefficients(call: Call, kept: Kept, grads: RowGrads, vocab_size: int) -> RowCoefficients:
    """Return what the upstream gradients ask of every entry and of the label's."""
    logps = kept.target_logit - kept.logsumexp
    zero = torch.zeros_like(logps)
    g_logps = zero if grads.logps is None else grads.logps
    g_lse = zero if grads.logsumexp is None else grads.logsumexp
    probs = kept.label_probs()
    label = g_logps * kept.rest + g_lse * probs
    everywhere = None
    if grads.entropy is not None:
        # a label of probability 0 has no part in an entropy
        term = torch.where(probs == 0, 0.0, probs * (logps + kept.entropy))
        label = label - grads.entropy * term
    if grads.mean_logits is not None:
        everywhere = grads.mean_logits / call.whole_vocab(vocab_size)
        label = label + everywhere
    return RowCoefficients(
        on_p=g_lse - g_logps,
        on_label=label * call.target_slope(kept.target_logit),
        g_entropy=grads.entropy,
        entropy=kept.entropy if grads.entropy is not None else None,
        everywhere=everywhere,
    )


def backward_direction(
    call: Call,
    rows: Rows,
    inputs: Inputs,
    kept: Kept,
    grads: RowGrads,
    need: frozenset[str],
    into: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return grad_hidden / grad_lora_a as a row scale of the kept directions.

        grad_h = (g_logps - g_lse) D + g_lse f_y W[y] + g_mean f mean_v W_v

    The second term is d logsumexp / dh = f_y W[y] - D; the last holds without a softcap. A rank of
    a group keeps ``D_r = -f sum_{v != y} p_v W_v`` of its slice's own softmax instead:
    ``D = share D_r + rest f_y W[y]``, the last term where its slice has the label.
    """
    pairs = [("hidden", inputs.hidden, kept.direction, inputs.weight)]
    pairs.append(("lora_a", inputs.lora_a, kept.direction_lora, inputs.lora_b))
    upstream = torch.zeros_like(kept.logsumexp)
    if grads.logps is not None:
        upstream = upstream + grads.logps
    if grads.logsumexp is not None:
        upstream = upstream - grads.logsumexp
    on_label, labels = grads.logsumexp, inputs.labels
    if call.shard is not None:
        # g_lse p_y + g_logps (1 - p_y), from the whole head's softmax
        terms = ((grads.logps, kept.rest), (grads.logsumexp, kept.label_probs()))
        present = (grad * factor for grad, factor in terms if grad is not None)
        on_label = sum(present, torch.zeros_like(upstream))
        on_label = on_label.where(inputs.owns_label(), 0.0)
        labels = labels.clamp(0, inputs.weight.shape[0] - 1)
        upstream = upstream * kept.share
    out = {}
    for i, (name, tensor, direction, head) in enumerate(pairs):
        if name not in need:
            continue
        scale = upstream if kept.direction_scale is None else upstream * kept.direction_scale[i]
        if name not in into:
            out[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        mean_row = None
        if grads.mean_logits is not None:
            scale_mean = call.slope / call.whole_vocab(head.shape[0])
            mean_row = head.sum(0, dtype=kept.logsumexp.dtype) * scale_mean
        for start in range(0, rows.count, call.row_chunk):
            part = slice(start, min(start + call.row_chunk, rows.count))
            value = direction[part] * scale[part, None]
            if call.shard is not None:
                # a slice whose logits are all -inf has no softmax of its own
                value = value.where(kept.share[part, None] != 0, 0.0)
            if on_label is not None:
                slope = call.target_slope(kept.target_logit[part])
                label_row = head[labels[part]].to(call.compute_dtype).to(value.dtype)
                value = value + (on_label[part] * slope)[:, None] * label_row
            if mean_row is not None:
                value = value + grads.mean_logits[part, None] * mean_row
            if name in into:
                into[name][part] = value
            else:
                rows.put(out[name], part.start, part.stop, value)
    return out
