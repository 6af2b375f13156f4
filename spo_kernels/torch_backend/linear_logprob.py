"""Torch backend of ``linear_logprob``: fp32 logits tiles on any device, never ``[N, V]``.

A tile is ``[row_chunk, vocab_chunk]`` in fp32 (fp64 for fp64 inputs) even for half inputs, whose
weight is upcast a vocab chunk at a time. Rows carry a running maximum over the vocabulary; a row's
log-prob has the same bits whatever the row chunk or strategy, because the vocabulary is always
walked in the same steps and row chunks are padded to a multiple of TORCH_MIN_ROWS (a BLAS takes
another path for a handful of rows).
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F

from spo_kernels.calls.layout import TORCH_MIN_ROWS
from spo_kernels.calls.linear_logprob import Call, Inputs, Kept, RowCoefficients, RowGrads, Rows
from spo_kernels.calls.linear_logprob_backward import backward_direction, row_coefficients

_NEG_INF = float("-inf")
_LEAST_LOG_P = -1000.0


def forward(call: Call, rows: Rows, inputs: Inputs) -> tuple[dict[str, torch.Tensor], Kept]:
    """Return the asked row outputs ``[N]`` and what the backward needs."""
    acc = _accumulator_dtype(call)
    device, N = inputs.hidden.device, rows.count
    V, H = inputs.weight.shape
    asked, needs = call.settings.outputs, call.settings.needs_grad
    width = min(call.plan.vocab_chunk, V)
    tiles = -(-V // width)

    out = {name: torch.empty(N, dtype=acc, device=device) for name in asked - {"is_top1"}}
    if "is_top1" in asked:
        out["is_top1"] = torch.empty(N, dtype=torch.bool, device=device)
        if call.shard is not None:
            out["row_max"] = torch.empty(N, dtype=acc, device=device)
    target_logit = torch.empty(N, dtype=acc, device=device)
    logsumexp = torch.empty(N, dtype=acc, device=device)
    rest = torch.empty(N, dtype=acc, device=device)
    direction = direction_lora = exps = exp_reference = None
    if call.plan.strategy == "direction":
        if "hidden" in needs:
            direction = torch.empty(N, H, dtype=acc, device=device)
        if "lora_a" in needs:
            direction_lora = torch.empty(N, inputs.lora_b.shape[1], dtype=acc, device=device)
    if call.plan.strategy == "resident":
        exps = torch.empty(N, V, dtype=_kept_dtype(call), device=device)
        exp_reference = torch.empty(N, tiles, dtype=acc, device=device)

    buffers = _Buffers(call, rows, width, acc, device)
    for start in range(0, N, call.plan.row_chunk):
        stop = min(start + call.plan.row_chunk, N)
        chunk = slice(start, stop)
        chunk_rows = _RowChunk(call, rows, inputs, start, stop, acc)
        n, labels = chunk_rows.padded, chunk_rows.labels
        run_max = torch.full((n,), _NEG_INF, dtype=acc, device=device)
        others = torch.zeros(n, dtype=acc, device=device)
        weighted = torch.zeros(n, dtype=acc, device=device)
        squares = torch.zeros(n, dtype=acc, device=device)
        plain_sum = torch.zeros(n, dtype=acc, device=device)
        first_max = torch.zeros(n, dtype=torch.int64, device=device)
        target = torch.full((n,), call.absent_logit, dtype=acc, device=device)
        sum_w = torch.zeros(n, H, dtype=acc, device=device) if direction is not None else None
        sum_b = None
        if direction_lora is not None:
            sum_b = torch.zeros(n, inputs.lora_b.shape[1], dtype=acc, device=device)

        for tile_index, v0 in enumerate(range(0, V, width)):
            head = _HeadSlice(call, inputs, v0, min(v0 + width, V), acc)
            z = chunk_rows.logits(call, head, buffers.logits)
            local = (labels - v0).clamp(0, head.width - 1)[:, None]
            inside = (labels >= v0) & (labels < v0 + head.width)
            target = torch.where(inside, z.gather(1, local)[:, 0], target)
            if "mean_logits" in asked:
                plain_sum += z.sum(-1)
            if "is_top1" in asked:
                tile_max, where_max = z.max(-1)
                first_max = torch.where(tile_max > run_max, where_max + v0, first_max)
            else:
                tile_max = z.amax(-1)
            new_max = torch.maximum(run_max, tile_max)
            # a row that is -inf so far has no reference yet
            reference = torch.where(new_max == _NEG_INF, 0.0, new_max)
            keep = torch.exp(run_max - reference)
            run_max = new_max
            e = torch.sub(z, reference[:, None], out=buffers.exps_of(z)).exp_()
            if "log_sum_sq_probs" in asked:
                norm = torch.linalg.vector_norm(e, dim=-1)
                squares = squares * keep * keep + norm * norm
            cap_slope = None
            if call.settings.softcap is not None and call.plan.strategy in (
                "direction",
                "resident",
            ):
                cap_slope = (
                    (z * (call.settings.temperature / call.settings.softcap))
                    .square_()
                    .neg_()
                    .add_(1.0)
                )
            if "entropy" in asked:
                # -inf times a zero probability is 0 in an entropy
                product = z.clamp_(min=torch.finfo(acc).min).mul_(e)
                weighted = weighted * keep + product.sum(-1)
            # the label's own term is added from its logit at the end: 1 - p_label must not cancel
            e.scatter_(1, local, torch.where(inside[:, None], 0.0, e.gather(1, local)))
            others = others * keep + e.sum(-1)
            if cap_slope is not None:
                e.mul_(cap_slope)
            if exps is not None:
                gain = _exp_gain(call)
                if gain != 1.0:
                    e.mul_(gain)
                exps[chunk, v0 : v0 + head.width] = e[: stop - start]
                exp_reference[chunk, tile_index] = reference[: stop - start]
            if call.plan.strategy == "direction":
                if sum_w is not None:
                    sum_w.mul_(keep[:, None]).addmm_(e, head.weight)
                if sum_b is not None:
                    sum_b.mul_(keep[:, None]).addmm_(e, head.lora_b)

        m = stop - start
        own = torch.exp(target - torch.where(run_max == _NEG_INF, 0.0, run_max))
        total = others + own
        lse = (run_max + torch.log(total))[:m]
        target = target[:m]
        logsumexp[chunk], target_logit[chunk] = lse, target
        rest[chunk] = (others / total)[:m]
        # a label that outweighs the rest has a log-prob near 0, which a difference would blur
        logps = torch.where((own > others)[:m], -torch.log1p(others / own)[:m], target - lse)
        values = {
            "logps": logps,
            "logsumexp": lse,
            "entropy": lse - (weighted / total)[:m],
            "mean_logits": (plain_sum / V)[:m],
            "log_sum_sq_probs": (torch.log(squares) - 2 * torch.log(total))[:m],
            "is_top1": (first_max[:m] == labels[:m]) & (logps == logps),
            "row_max": run_max[:m],
        }
        for name in out:
            out[name][chunk] = values[name]
        for kept, weighted_rows, matrix in (
            (direction, sum_w, inputs.weight),
            (direction_lora, sum_b, inputs.lora_b),
        ):
            if kept is None:
                continue
            scale = -call.settings.slope / total[:m, None]
            if call.shard is not None:
                # the label's term waits for the whole softmax
                torch.mul(weighted_rows[:m], scale, out=kept[chunk])
                continue
            gain = rest[chunk] * call.settings.target_slope(target)
            label_rows = matrix[labels[:m]].to(call.settings.compute_dtype).to(acc)
            torch.addcmul(weighted_rows[:m] * scale, gain[:, None], label_rows, out=kept[chunk])

    entropy = out["entropy"] if "entropy" in asked else None
    kept = Kept(
        target_logit=target_logit,
        logsumexp=logsumexp,
        rest=rest,
        entropy=entropy,
        direction=direction,
        direction_lora=direction_lora,
        exps=exps,
        exp_reference=exp_reference,
    )
    return out, kept


def backward(
    call: Call,
    rows: Rows,
    inputs: Inputs,
    kept: Kept,
    grads: RowGrads,
    need: frozenset[str],
    into: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """Return the gradients named in ``need``, each in its parameter's dtype.

    A gradient that has an accumulator in ``into``, of the products' dtype, is added there and not
    returned: hidden and lora_a as their scored rows ``[N, *]``, 0 so far, the others whole.
    """
    capped = call.settings.softcap is not None
    if call.plan.strategy == "direction":
        if grads.entropy is None and not (capped and grads.mean_logits is not None):
            return backward_direction(call, rows, inputs, kept, grads, need, into)
    acc = _accumulator_dtype(call)
    device, N = inputs.hidden.device, rows.count
    V = inputs.weight.shape[0]
    width = min(call.plan.vocab_chunk, V)
    # behind a softcap the kept exponential holds its slope too, but the logit is lost
    needs_logits = grads.entropy is not None or grads.mean_logits is not None
    use_kept = kept.exps is not None and not (capped and needs_logits)
    out = {
        name: torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        for name, tensor in zip(Inputs._fields[:5], inputs[:5], strict=True)
        if name in need and name not in into
    }
    # a gradient of the products' dtype is summed where it is returned
    direct = {name: value for name, value in out.items() if value.dtype == acc}
    sums = {}
    for name in ("hidden", "lora_a"):
        if name in into:
            sums[name] = into[name]
        elif name in direct and rows.index is None:
            sums[name] = rows.take_all(direct[name])
        elif name in need:
            sums[name] = torch.zeros(N, out[name].shape[-1], dtype=acc, device=device)
    heads = {
        name: into.get(name, direct.get(name))
        for name in ("weight", "bias", "lora_b")
        if name in need
    }
    vectors = row_coefficients(call, kept, grads, V)
    buffers = _Buffers(call, rows, width, acc, device)
    for tile_index, v0 in enumerate(range(0, V, width)):
        head = _HeadSlice(call, inputs, v0, min(v0 + width, V), acc)
        v1 = v0 + head.width
        slices = {
            name: torch.zeros(head.width, *out[name].shape[1:], dtype=acc, device=device)
            if total is None
            else total[v0:v1]
            for name, total in heads.items()
        }
        for start in range(0, N, call.plan.row_chunk):
            stop = min(start + call.plan.row_chunk, N)
            chunk = slice(start, stop)
            x = _RowChunk(call, rows, inputs, start, stop, acc, pad=False)
            if use_kept:
                factor = torch.exp(kept.exp_reference[chunk, tile_index] - kept.logsumexp[chunk])
                p = buffers.logits[: stop - start, : head.width]
                p.copy_(kept.exps[chunk, v0:v1]).mul_((factor / _exp_gain(call))[:, None])
                z = None
            else:
                z = x.logits(call, head, buffers.logits)
                p = torch.sub(z, kept.logsumexp[chunk, None], out=buffers.exps_of(z)).exp_()
            chunk_vectors = RowCoefficients(*(None if v is None else v[chunk] for v in vectors))
            local = inputs.labels[chunk] - v0
            grad = _gradient_tile(call, chunk_vectors, kept.logsumexp[chunk], p, z, local)
            if "hidden" in sums:
                sums["hidden"][chunk].addmm_(grad, head.weight)
            if "lora_a" in sums:
                sums["lora_a"][chunk].addmm_(grad, head.lora_b)
            if "weight" in slices:
                slices["weight"].addmm_(grad.t(), x.hidden)
            if "lora_b" in slices:
                slices["lora_b"].addmm_(grad.t(), x.lora_a)
            if "bias" in slices:
                slices["bias"] += grad.sum(0)
        for name, value in slices.items():
            if heads[name] is None:
                out[name][v0:v1] = value
    for name, value in sums.items():
        if name in out and not (name in direct and rows.index is None):
            rows.put(out[name], 0, N, value)
    return out


def _gradient_tile(
    call: Call,
    rows: RowCoefficients,
    logsumexp: torch.Tensor,
    p: torch.Tensor,
    z: torch.Tensor | None,
    local: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient tile, overwriting ``p``; ``z`` is None where it was not recomputed."""
    if rows.g_entropy is None:
        grad = p.mul_(rows.on_p[:, None])
    else:
        log_p = torch.log(p) if z is None else z - logsumexp[:, None]
        # where p underflows to 0 any finite value will do, -inf would make NaN
        log_p.clamp_(min=_LEAST_LOG_P).add_(rows.entropy[:, None])
        log_p.mul_(-rows.g_entropy[:, None]).add_(rows.on_p[:, None])
        grad = p.mul_(log_p)
    if rows.everywhere is not None:
        grad.add_(rows.everywhere[:, None])
    if call.settings.softcap is not None and z is not None:
        tanh = z * (call.settings.temperature / call.settings.softcap)
        grad.mul_(tanh.square_().neg_().add_(1.0))
    if call.settings.slope != 1.0:
        grad.mul_(call.settings.slope)
    width = grad.shape[1]
    index = local.clamp(0, width - 1)[:, None]
    inside = ((local >= 0) & (local < width))[:, None]
    label = torch.where(inside, rows.on_label[:, None], grad.gather(1, index))
    return grad.scatter_(1, index, label)


class _Buffers:
    """The two reused tiles: logits, and exponentials where they must not overwrite the logits."""

    def __init__(self, call: Call, rows: Rows, width: int, acc: torch.dtype, device: torch.device):
        shape = (_pad_rows(min(call.plan.row_chunk, rows.count)), width)
        self.logits = torch.empty(shape, dtype=acc, device=device)
        self._second = None
        if call.settings.softcap is not None or call.settings.outputs & {"entropy"}:
            self._second = torch.empty(shape, dtype=acc, device=device)

    def exps_of(self, z: torch.Tensor) -> torch.Tensor:
        return z if self._second is None else self._second[: z.shape[0], : z.shape[1]]


class _HeadSlice:
    """Rows ``v0:v1`` of the head in the accumulator dtype."""

    def __init__(self, call: Call, inputs: Inputs, v0: int, v1: int, acc: torch.dtype):
        def cast(tensor):
            return None if tensor is None else tensor[v0:v1].to(call.settings.compute_dtype).to(acc)

        self.width = v1 - v0
        self.weight = cast(inputs.weight)
        self.bias = cast(inputs.bias)
        self.lora_b = cast(inputs.lora_b)


class _RowChunk:
    """Rows ``start:stop`` in the accumulator dtype, padded for the forward."""

    def __init__(
        self,
        call: Call,
        rows: Rows,
        inputs: Inputs,
        start: int,
        stop: int,
        acc: torch.dtype,
        pad: bool = True,
    ):
        self.padded = _pad_rows(stop - start) if pad else stop - start
        missing = self.padded - (stop - start)

        def cast(tensor):
            if tensor is None:
                return None
            value = rows.take(tensor, start, stop).to(call.settings.compute_dtype).to(acc)
            return F.pad(value, (0, 0, 0, missing)) if missing else value

        self.hidden = cast(inputs.hidden)
        self.lora_a = cast(inputs.lora_a)
        self.labels = F.pad(inputs.labels[start:stop], (0, missing))

    def logits(self, call: Call, head: _HeadSlice, buffer: torch.Tensor) -> torch.Tensor:
        """Return the transformed logits ``[padded, width]`` in ``buffer``."""
        z = buffer[: self.padded, : head.width]
        torch.mm(self.hidden, head.weight.t(), out=z)
        if head.lora_b is not None:
            z.addmm_(self.lora_a, head.lora_b.t())
        if head.bias is not None:
            z.add_(head.bias)
        if call.settings.softcap is not None:
            z.mul_(call.settings.logit_scale / call.settings.softcap).tanh_().mul_(
                call.settings.softcap / call.settings.temperature
            )
        elif call.settings.slope != 1.0:
            z.mul_(call.settings.slope)
        return z


def _pad_rows(n: int) -> int:
    return max(1, -(-n // TORCH_MIN_ROWS)) * TORCH_MIN_ROWS


def _accumulator_dtype(call: Call) -> torch.dtype:
    return torch.float64 if call.settings.compute_dtype == torch.float64 else torch.float32


def _kept_dtype(call: Call) -> torch.dtype:
    # exponentials lie in [0, 1], where fp16 has 8 times bf16's precision
    return (
        torch.float16 if call.settings.compute_dtype.itemsize == 2 else call.settings.compute_dtype
    )


def _exp_gain(call: Call) -> float:
    # fp16 has no small exponents: use the head room above 1
    return 2.0**15 if _kept_dtype(call) == torch.float16 else 1.0
