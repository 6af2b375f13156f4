"""Triton backend of ``linear_logprob``: the strategies, as loops over kernels and plain GEMMs.

Products that stay plain go through torch (cuBLAS) with an fp32 result. The forward walks row
chunks; the backward walks vocab chunks with all rows inside, so each slice of grad_weight is one
product.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from spo_kernels.calls import layout
from spo_kernels.calls.layout import (
    PART_V,
    head_slice_columns,
    padded_columns,
)
from spo_kernels.calls.linear_logprob import Call, Inputs, Kept, RowGrads, Rows
from spo_kernels.calls.linear_logprob_backward import backward_direction, row_coefficients
from spo_kernels.kernels import linear_logprob_bwd as bwd
from spo_kernels.kernels import linear_logprob_bwd_weight as bwd_weight
from spo_kernels.kernels import linear_logprob_fwd as fwd
from spo_kernels.kernels import linear_logprob_rows as row_kernels
from spo_kernels.kernels import logits_tile
from spo_kernels.kernels.device import arch_of, cdiv, shared_bytes
from spo_kernels.kernels.logits_tile import Partials, Transform
from spo_kernels.kernels.tiles import Tile, tile_for

# scratch of the pass that an unplanned entropy gradient costs `direction`
_FALLBACK_BYTES = 64 << 20
# a row's reference is its maximum over this many columns
_REFERENCE_COLUMNS = 256
_STATS = {
    "entropy": logits_tile.ENTROPY.value,
    "log_sum_sq_probs": logits_tile.SQUARES.value,
    "mean_logits": logits_tile.MEAN.value,
    "is_top1": logits_tile.TOP1.value,
}


def forward(call: Call, rows: Rows, inputs: Inputs) -> tuple[dict[str, torch.Tensor], Kept]:
    """Return the asked row outputs ``[N]`` and what the backward needs."""
    device, N = inputs.hidden.device, rows.count
    V, H = inputs.weight.shape
    head = _Head(call, inputs)
    names = {"logsumexp", "logps", "rest", *(call.settings.outputs & set(_STATS))}
    out = {
        name: torch.empty(
            N, dtype=torch.bool if name == "is_top1" else torch.float32, device=device
        )
        for name in names
    }
    if call.shard is not None and "is_top1" in names:
        out["row_max"] = torch.empty(N, dtype=torch.float32, device=device)
    target_logit = torch.empty(N, dtype=torch.float32, device=device)
    write_exp = 0
    # kept for the backward: bf16 with fp16's precision, others without a rounding of their own
    kept_dtype = torch.float16 if call.settings.compute_dtype == torch.bfloat16 else torch.float32
    direction = direction_lora = direction_scale = exps = references = None
    if call.plan.strategy == "direction":
        own = call.settings.compute_dtype == torch.float16
        mode = logits_tile.OWN_REFERENCE if own else logits_tile.ROW_REFERENCE
        write_exp = mode.value
        shape = (min(call.plan.row_chunk, N), padded_columns(V))
        exps = torch.empty(shape, dtype=call.settings.compute_dtype, device=device)[:, :V]
        # fp16 with one scale a row: the bytes of bf16, 8 times its precision
        if "hidden" in call.settings.needs_grad:
            direction = torch.empty(N, H, dtype=kept_dtype, device=device)
        if "lora_a" in call.settings.needs_grad:
            rank = inputs.lora_b.shape[1]
            direction_lora = torch.empty(N, rank, dtype=kept_dtype, device=device)
        direction_scale = torch.empty(2, N, dtype=torch.float32, device=device)
    if call.plan.strategy == "resident":
        write_exp = logits_tile.OWN_REFERENCE.value
        exps = torch.empty(N, padded_columns(V), dtype=kept_dtype, device=device)[:, :V]
        references = torch.empty(head.parts, N, dtype=torch.float32, device=device)

    for start in range(0, N, call.plan.row_chunk):
        stop = min(start + call.plan.row_chunk, N)
        chunk = slice(start, stop)
        at = slice(0, stop - start) if call.plan.strategy == "direction" else chunk
        chunk_out = {name: value[chunk] for name, value in out.items()}
        chunk_out["target"] = target_logit[chunk]
        chunk_exps = None if exps is None else exps[at]
        labels = inputs.labels[chunk]
        hidden, lora_a = _chunk_rows(call, rows, inputs, start, stop)
        scored = _score_chunk(call, head, hidden, lora_a, labels, chunk_out, chunk_exps, write_exp)
        if call.plan.strategy == "resident":
            references[:, chunk] = scored.part_max
        if call.plan.strategy == "direction":
            row_kernels.linear_logprob_rescale(
                chunk_exps,
                scored.part_max,
                scored.reference,
                scored.row_max,
                chunk_out["logsumexp"],
                write_exp=write_exp,
            )
            gain = chunk_out["rest"] * call.settings.target_slope(chunk_out["target"])
            if call.shard is not None:
                # the label's term waits for the whole softmax
                gain.zero_()
            for i, (kept, matrix) in enumerate(
                ((direction, inputs.weight), (direction_lora, inputs.lora_b))
            ):
                if kept is not None:
                    row_kernels.linear_logprob_direction(
                        head.product(chunk_exps, matrix),
                        matrix,
                        labels,
                        scored.factor,
                        gain,
                        kept[chunk],
                        direction_scale[i, chunk],
                        slope=call.settings.slope,
                        compute_dtype=call.settings.compute_dtype,
                    )
        # the next chunk's partials must not be made beside these
        del scored, chunk_out, hidden, lora_a
    kept = Kept(
        target_logit=target_logit,
        logsumexp=out["logsumexp"],
        rest=out["rest"],
        entropy=out.get("entropy"),
        direction=direction,
        direction_lora=direction_lora,
        direction_scale=direction_scale,
        exps=exps if call.plan.strategy == "resident" else None,
        exp_reference=references,
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
    needs_logits = grads.entropy is not None or grads.mean_logits is not None
    if call.plan.strategy == "direction":
        if grads.entropy is None and not (call.settings.softcap is not None and needs_logits):
            return backward_direction(call, rows, inputs, kept, grads, need, into)
    # behind a softcap the kept exponential holds its slope too, but the logit is lost
    use_kept = kept.exps is not None and not (call.settings.softcap is not None and needs_logits)
    device, N = inputs.hidden.device, rows.count
    V = inputs.weight.shape[0]
    dtype = call.settings.compute_dtype
    vectors, row_scale = _vectors(call, kept, grads, V)
    hidden, lora_a = _chunk_rows(call, rows, inputs, 0, N)

    out = {}
    for name, tensor in zip(Inputs._fields[:5], inputs[:5], strict=True):
        if name in need and name not in into:
            # without rows nothing is written, and ignored rows never are
            is_written = N > 0 and (rows.index is None or name not in ("hidden", "lora_a"))
            make = torch.empty_like if is_written else torch.zeros_like
            out[name] = make(tensor, memory_format=torch.contiguous_format)
    sums = {
        name: into[name]
        if name in into
        else torch.zeros(N, tensor.shape[-1], dtype=torch.float32, device=device)
        for name, tensor in (("hidden", inputs.hidden), ("lora_a", inputs.lora_a))
        if name in need
    }
    # the head's gradients are summed against rows scaled by an exact power of two
    largest = row_scale.amax() if N else row_scale.new_ones(())
    relative = (row_scale / largest).to(dtype)[:, None]
    scaled, is_half = dtype == torch.float16, dtype.itemsize == 2
    right = {
        "weight": hidden * relative if scaled and "weight" in need else hidden,
        "bias": relative,
        "lora_b": lora_a * relative if scaled and "lora_b" in need else lora_a,
    }
    head = _Head(call, inputs)
    # a recomputed tile reads a copied head slice by slice; a direction plan has no chunk for this
    step = min(call.plan.vocab_chunk, V)
    if call.plan.strategy == "direction":
        step = min(step, max(1, _FALLBACK_BYTES // max(1, N * dtype.itemsize) // 256) * 256)
    step = min(step, head.columns) if head.columns < V else step
    scratch = torch.empty(N, padded_columns(step), dtype=dtype, device=device)
    for v0 in range(0, V if N else 0, step):
        v1 = min(v0 + step, V)
        weight, bias, lora_b = head.slice(v0, v1)
        grad = scratch[:, : v1 - v0]
        if use_kept:
            bwd.linear_logprob_bwd_exps(
                kept.exps[:, v0:v1],
                kept.exp_reference,
                inputs.labels,
                vectors,
                grad,
                v_start=v0,
                outer=call.settings.slope,
            )
        else:
            bwd.linear_logprob_bwd_logits(
                hidden,
                weight,
                inputs.labels,
                vectors,
                grad,
                bias=bias,
                lora_a=lora_a,
                lora_b=lora_b,
                v_start=v0,
                outer=call.settings.slope,
                tile=_tile("bwd", call, hidden, weight),
                transform=_transform_of(call),
            )
        for name, matrix in (("hidden", weight), ("lora_a", lora_b)):
            if name in sums:
                _add_product(sums[name], grad, matrix)
        for name in ("weight", "bias", "lora_b"):
            if name not in need:
                continue
            total = (into if name in into else out)[name][v0:v1]
            total = total[:, None] if name == "bias" else total
            if name in into and not scaled:
                _add_product(total, grad.t(), right[name])
                continue
            if name == "weight" and name not in into and N <= layout.WEIGHT_KERNEL_ROWS and is_half:
                tile = _tile("weight", call, grad, right[name])
                bwd_weight.linear_logprob_bwd_weight(grad, right[name], largest, total, tile=tile)
                continue
            value = _product(grad.t(), right[name])
            if scaled:
                value.mul_(largest)
            if name in into:
                total += value
            else:
                total.copy_(value)
            del value
    for name, value in sums.items():
        if scaled:
            value.mul_(row_scale[:, None])
        if name not in into:
            rows.put_all(out[name], value, call.plan.row_chunk)
    return out


class _Head:
    """The head in the compute dtype, whole where it can be read as it is, else slice by slice."""

    def __init__(self, call: Call, inputs: Inputs):
        self.call, self.inputs = call, inputs
        weight = inputs.weight
        copied = weight.dtype != call.settings.compute_dtype or weight.stride(1) != 1
        self.columns = head_slice_columns(
            weight.shape[0], weight.shape[1], call.settings.compute_dtype.itemsize, copied
        )
        self.parts = cdiv(weight.shape[0], PART_V)

    def slice(self, v0: int, v1: int):
        """Return (weight, bias, lora_b) rows ``v0:v1``, each last-axis contiguous."""
        weight, bias, lora_b = (
            None if tensor is None else self._ready(tensor[v0:v1])
            for tensor in (self.inputs.weight, self.inputs.bias, self.inputs.lora_b)
        )
        # the kernels read LoRA factors with a row stride of r
        return weight, bias, None if lora_b is None else lora_b.contiguous()

    def slices(self):
        """Yield (v0, weight, bias, lora_b) over the vocabulary."""
        V = self.inputs.weight.shape[0]
        for v0 in range(0, V, self.columns):
            yield v0, *self.slice(v0, min(v0 + self.columns, V))

    def product(self, exps: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Return ``exps @ matrix`` in fp32."""
        V = matrix.shape[0]
        total = None
        for v0 in range(0, V, self.columns):
            v1 = min(v0 + self.columns, V)
            head = self._ready(matrix[v0:v1])
            if total is None:
                total = _product(exps[:, v0:v1], head)
            else:
                _add_product(total, exps[:, v0:v1], head)
        return total

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.call.settings.compute_dtype)
        return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _ScoredChunk(NamedTuple):
    """Read by the strategies of a scored row chunk, beside its row outputs."""

    part_max: torch.Tensor  # [S, n] fp32
    reference: torch.Tensor | None  # [n] fp32, one reference a row
    row_max: torch.Tensor | None  # [n] fp32
    factor: torch.Tensor | None  # [n] fp32: p = factor * exponentials, where they are kept


def _score_chunk(
    call: Call,
    head: _Head,
    hidden: torch.Tensor,
    lora_a: torch.Tensor | None,
    labels: torch.Tensor,
    out: dict[str, torch.Tensor],
    exps: torch.Tensor | None,
    write_exp: int,
) -> _ScoredChunk:
    """Fill the row outputs and exponentials of one row chunk."""
    n, device = hidden.shape[0], hidden.device
    V = head.inputs.weight.shape[0]
    asked = call.settings.outputs
    stats = sum(bit for name, bit in _STATS.items() if name in asked)

    def partial(name: str | None = None) -> torch.Tensor | None:
        if name is not None and name not in asked:
            return None
        return torch.empty(head.parts, n, dtype=torch.float32, device=device)

    partials = Partials(
        max=partial(),
        sum=partial(),
        weighted=partial("entropy"),
        squares=partial("log_sum_sq_probs"),
        plain=partial("mean_logits"),
        # default for labels outside [0, V): no tile writes them
        target=out["target"].fill_(call.absent_logit),
        top1=torch.full((n,), -1, dtype=torch.int32, device=device),
    )
    transform = _transform_of(call)

    def launch(v0: int, weight, bias, lora_b, reference, exps_slice, stats: int, mode: int):
        fwd.linear_logprob_fwd(
            hidden,
            weight,
            labels,
            bias=bias,
            lora_a=lora_a,
            lora_b=lora_b,
            partials=partials,
            reference=reference,
            exps=exps_slice,
            v_start=v0,
            first_part=v0 // PART_V,
            stats=stats,
            write_exp=mode,
            transform=transform,
            tile=_tile("fwd", call, hidden, weight),
        )

    reference = None
    if write_exp == logits_tile.ROW_REFERENCE.value:
        # one reference a row: its maximum over the first vocab tile
        weight, bias, lora_b = head.slice(0, min(_REFERENCE_COLUMNS, V))
        launch(0, weight, bias, lora_b, None, None, 0, 0)
        reference = partials.max[: cdiv(weight.shape[0], PART_V)].amax(0)
    for v0, weight, bias, lora_b in head.slices():
        exps_slice = None if exps is None else exps[:, v0 : v0 + weight.shape[0]]
        launch(v0, weight, bias, lora_b, reference, exps_slice, stats, write_exp)
    row_max, factor = out.get("row_max"), None
    if row_max is not None:
        torch.amax(partials.max, 0, out=row_max)
    if write_exp:
        if row_max is None:
            row_max = torch.empty(n, dtype=torch.float32, device=device)
        factor = torch.empty(n, dtype=torch.float32, device=device)
    row_kernels.linear_logprob_reduce(
        partials,
        reference,
        out,
        row_max=row_max,
        factor=factor,
        vocab_size=V,
        stats=stats,
        write_exp=write_exp,
    )
    return _ScoredChunk(partials.max, reference, row_max, factor)


def _vectors(
    call: Call, kept: Kept, grads: RowGrads, vocab_size: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the row vectors of the gradient tile and each row's power of two (1 but for fp16)."""
    rows = row_coefficients(call, kept, grads, vocab_size)
    linear = {"on_p": rows.on_p, "on_label": rows.on_label}
    if rows.g_entropy is not None:
        linear["g_entropy"] = rows.g_entropy
    if rows.everywhere is not None:
        linear["everywhere"] = rows.everywhere
    row_scale = torch.ones_like(rows.on_p)
    if call.settings.compute_dtype == torch.float16:
        # fp16 would flush small entries, so each row's bound is brought to 1024; p (log p +
        # entropy) is at most log V < 16
        slopes = {"on_label": 1.0, "g_entropy": 16.0 * call.settings.slope}
        bounds = [
            value.abs() * slopes.get(name, call.settings.slope) for name, value in linear.items()
        ]
        largest = torch.stack(bounds).amax(0)
        _, exponent = torch.frexp(largest)
        scale = torch.ldexp(torch.ones_like(largest), exponent - 10)
        row_scale = torch.where(largest > 0, scale, 1.0)
        linear = {name: value / row_scale for name, value in linear.items()}
    vectors = {name: value.contiguous() for name, value in linear.items()}
    vectors["logsumexp"] = kept.logsumexp
    if rows.entropy is not None:
        vectors["entropy"] = rows.entropy
    return vectors, row_scale


def _transform_of(call: Call) -> Transform:
    wishes = call.settings
    if wishes.softcap is not None:
        return Transform(
            kind=logits_tile.CAPPED.value,
            scale=wishes.logit_scale / wishes.softcap,
            softcap=wishes.softcap / wishes.temperature,
        )
    kind = 0 if wishes.slope == 1.0 else logits_tile.SCALED.value
    return Transform(kind=kind, scale=wishes.slope)


def _chunk_rows(call: Call, rows: Rows, inputs: Inputs, start: int, stop: int):
    """Return (hidden, lora_a) rows in the compute dtype, last axis contiguous."""

    def ready(tensor: torch.Tensor | None, packed: bool) -> torch.Tensor | None:
        if tensor is None:
            return None
        value = rows.take(tensor, start, stop).to(call.settings.compute_dtype)
        # rows that overlap in memory (an expanded tensor) have no row stride to load by
        strided = value.stride(-1) == 1 and value.stride(0) >= value.shape[1]
        return value if strided and not packed else value.contiguous()

    return ready(inputs.hidden, False), ready(inputs.lora_a, True)


def _tile(kernel: str, call: Call, hidden: torch.Tensor, weight: torch.Tensor) -> Tile:
    aligned = all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1]
        for tensor in (hidden, weight)
    )
    device = hidden.device
    return tile_for(
        kernel,
        arch_of(device),
        call.settings.compute_dtype,
        shared_bytes=shared_bytes(device),
        tma=aligned and device.type == "cuda",
    )


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``a @ b`` in fp32, never rounded to the inputs' dtype on the way."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` for an fp32 total."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
