"""Fused forward of ``linear_logprob``: logits tile, row statistics, kept exponentials.

    z = cap((h W^T + bias + a b^T) * logit_scale) / temperature     one tile, never rounded
    per part: m = max z, s = sum_{v != y} exp(z - m), sum exp(z - m) z, sum exp(z - m)^2, sum z

Symbols: N rows, V vocab, H hidden, R LoRA rank, S parts of the vocabulary. One program of the
forward owns BLOCK_N x BLOCK_V logits at a time and walks the grid with a stride (persistent). The
accumulator is finished part by part, in pieces added up before lanes are, so that the epilogue
stays in registers; a part without a label, as nearly all are, takes a form without the label's
comparisons (6 instructions a logit instead of 14 for log-probs on sm_90). Products accumulate in
fp32. The exponentials are kept, 0 at the label, relative to one reference a row (bf16 and fp32,
ready for a product) or to a power of two above their part's maximum (fp16, which has no exponent
range; rescaling by powers of two is exact there).
"""

import torch
import triton
import triton.language as tl

from spo_kernels.kernels.device import (
    cdiv,
    device_guard,
    program_count,
    round_to,
    rounded_product,
)
from spo_kernels.kernels.logits_tile import (
    CAPPED,
    ENTROPY,
    FP16_GAIN,
    LEAST,
    LOG2E,
    MEAN,
    PART_V,
    PIECE_V,
    REFERENCE_SLACK,
    ROW_REFERENCE,
    SQUARES,
    TOP1,
    Partials,
    Transform,
    local_label,
    logits_tile,
    operand,
    padded,
    pieces_of,
    precision_of,
    tile_of,
    transform,
)
from spo_kernels.kernels.tiles import Tile


@triton.jit
def _finish_part(
    pieces,  # of transformed logits, left to right
    v0,
    part,
    offs_n,
    mask_n,
    label,
    reference_ptr,
    target_ptr,
    top1_ptr,
    exps_ptr,
    N,
    V,
    stride_exps_n,
    tanh_scale,
    TRANSFORM: tl.constexpr,
    STATS: tl.constexpr,
    WRITE_EXP: tl.constexpr,
    PLAIN: tl.constexpr,
):
    # PLAIN: every column is inside V and no row's label is among them. Both branches must use the
    # same operation order, or a row's result would depend on other rows' labels
    PIECES: tl.constexpr = PART_V // PIECE_V
    # 32-bit columns inside a piece keep the epilogue out of 64-bit arithmetic
    cols = tl.arange(0, PIECE_V)[None, :]
    others = ()
    for i in tl.static_range(PIECES):
        z = pieces[i]
        if PLAIN:
            plain = z
        else:
            inside = cols < V - v0 - i * PIECE_V
            label_col = (label - i * PIECE_V)[:, None]
            plain = tl.where(inside, z, 0.0)
            on_label = tl.where(cols == label_col, z, 0.0)
            before = tl.where(cols < label_col, z, float("-inf"))
            # the label's own term is added from its logit: 1 - p_label must not cancel
            z = tl.where(inside & (cols != label_col), z, float("-inf"))
        others = others + (z,)
        if i == 0:
            largest = z
            acc_plain = plain
            if not PLAIN:
                acc_label = on_label
                acc_before = before
        else:
            largest = tl.maximum(largest, z)
            acc_plain += plain
            if not PLAIN:
                acc_label += on_label
                acc_before = tl.maximum(acc_before, before)
    part_max = tl.max(largest, 1)
    if not PLAIN:
        # exactly one part owns a label, so these stores have one writer
        owns = mask_n & (label >= 0) & (label < PART_V) & (label < V - v0)
        target = tl.where(owns, tl.sum(acc_label, 1), float("-inf"))
        tl.store(target_ptr + offs_n, target, mask=owns)
        if (TOP1 & STATS) != 0:
            # the first maximum wins a tie
            beaten = (part_max > target) | (tl.max(acc_before, 1) >= target)
            # how many parts stand before this one, or -1 - that if the label loses in its own
            tl.store(top1_ptr + offs_n, tl.where(beaten, -1 - part, part), mask=owns)
        part_max = tl.maximum(part_max, target)
    own = tl.where(part_max == float("-inf"), 0.0, part_max)
    if WRITE_EXP != 0:
        exponent = rounded_product(own, LOG2E)
        gain = FP16_GAIN * tl.exp2(exponent - tl.ceil(exponent))
        if WRITE_EXP == ROW_REFERENCE:
            reference = tl.load(reference_ptr + offs_n, mask=mask_n, other=0.0)
            far = part_max > reference + REFERENCE_SLACK
            gain = tl.where(far, 1.0, tl.exp2((own - reference) * LOG2E))
        # exponentials of 0 stay 0 whatever their row's reference
        gain = tl.where(part_max == float("-inf"), 0.0, gain)
    for i in tl.static_range(PIECES):
        e = tl.exp2((others[i] - own[:, None]) * LOG2E)
        # the least float keeps 0 * -inf out
        finite = tl.maximum(others[i], LEAST)
        if i == 0:
            acc_sum = e
            acc_weighted = e * finite
            acc_squares = e * e
        else:
            acc_sum += e
            acc_weighted = tl.fma(e, finite, acc_weighted)
            acc_squares = tl.fma(e, e, acc_squares)
        if WRITE_EXP != 0:
            kept = e * gain[:, None]
            if TRANSFORM == CAPPED:
                tanh = finite * tanh_scale
                # a column past V has no slope
                kept = tl.where(kept == 0.0, 0.0, kept * (1.0 - tanh * tanh))
            mask = mask_n[:, None]
            if not PLAIN:
                mask = mask & (cols < padded(V) - v0 - i * PIECE_V)
            tl.store(
                exps_ptr + v0 + i * PIECE_V + offs_n[:, None] * stride_exps_n + cols,
                round_to(kept, exps_ptr.dtype.element_ty),
                mask=mask,
            )
    part_sum = tl.sum(acc_sum, 1)
    weighted = tl.sum(acc_weighted, 1)
    squares = tl.sum(acc_squares, 1)
    if not PLAIN:
        e_label = tl.exp2((target - own) * LOG2E)
        weighted += e_label * tl.maximum(target, LEAST)
        squares += e_label * e_label
    return part_max, part_sum, weighted, squares, tl.sum(acc_plain, 1)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _store_parts(ptr, values, parts, offs_n, mask, N, PARTS: tl.constexpr):
    # one layout change and one store for all parts of a tile
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4)
    if PARTS == 1:
        stacked = values[0][:, None]
    elif PARTS == 2:
        stacked = tl.join(values[0], values[1])
    else:
        # the last axis of a join is the new one: (0, 2), (1, 3) interleave to 0, 1, 2, 3
        even = tl.join(values[0], values[2])
        odd = tl.join(values[1], values[3])
        stacked = tl.reshape(tl.join(even, odd), (values[0].shape[0], 4))
    tl.store(ptr + parts[None, :] * N + offs_n[:, None], stacked, mask=mask)


# sizes must not pick the code of a row's sums, nor compile it again for each batch
@triton.jit(do_not_specialize=["N", "V", "v_start", "first_part"])
def _linear_logprob_fwd_kernel(
    hidden,  # [N, H] pointer or descriptor
    weight,  # [V, H] pointer or descriptor: one slice of the head
    bias_ptr,  # [V]
    lora_a_ptr,  # [N, R]
    lora_b_ptr,  # [V, R]
    labels_ptr,  # [N] int64
    reference_ptr,  # [N] fp32, reference of the exponentials
    part_max_ptr,  # [S, N] fp32, out
    part_sum_ptr,  # [S, N] fp32, out: without the label
    part_weighted_ptr,  # [S, N] fp32, out
    part_squares_ptr,  # [S, N] fp32, out
    part_plain_ptr,  # [S, N] fp32, out
    target_ptr,  # [N] fp32, out: target logit
    top1_ptr,  # [N] int32, out: part of the label, -1 - part where it loses there
    exps_ptr,  # [N, V] out, 0 up to the padded V
    N,
    V,
    H,
    R,
    v_start,
    first_part,
    stride_hidden_n,
    stride_weight_v,
    stride_exps_n,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    TRANSFORM: tl.constexpr,
    STATS: tl.constexpr,
    WRITE_EXP: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    PARTS: tl.constexpr = BLOCK_V // PART_V
    PIECES: tl.constexpr = PART_V // PIECE_V
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    for tile in range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0)):
        block_n, block_v = tile_of(tile, tiles_n, tiles_v, GROUP_N)
        n0 = block_n * BLOCK_N
        v0 = block_v * BLOCK_V
        acc_logits = logits_tile(
            hidden, weight, lora_a_ptr, lora_b_ptr, n0, v0, N, V, H, R,
            stride_hidden_n, stride_weight_v, HAS_LORA, PRECISION, USE_TMA,
            BLOCK_N, BLOCK_V, BLOCK_H, BLOCK_R,
        )  # fmt: skip
        offs_n = n0.to(tl.int64) + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        pieces = pieces_of(acc_logits, BLOCK_V // PIECE_V)
        label = local_label(labels_ptr, offs_n, mask_n, v_start + v0, BLOCK_V)
        # bit i: part i holds a row's label
        held = tl.where(label >= 0, 1 << (tl.maximum(label, 0) // PART_V), 0)
        owned = tl.reduce(held, 0, _either)
        # one row vector a part
        maxima = ()
        sums = ()
        weighted_sums = ()
        squared_sums = ()
        plain_sums = ()
        for i in tl.static_range(PARTS):
            first = v0 + i * PART_V
            logits = ()
            for j in tl.static_range(PIECES):
                column = first + j * PIECE_V
                logits = logits + (
                    transform(
                        pieces[i * PIECES + j], bias_ptr + column, V - column, scale, softcap,
                        HAS_BIAS, TRANSFORM,
                    ),
                )  # fmt: skip
            shared = (
                first, first_part + block_v * PARTS + i, offs_n, mask_n, label - i * PART_V,
                reference_ptr, target_ptr, top1_ptr, exps_ptr, N, V, stride_exps_n, 1.0 / softcap,
            )  # fmt: skip
            # two calls, since a constexpr cannot be a value of the run
            if (((owned >> i) & 1) == 0) & (first + PART_V <= V):
                part_max, part_sum, weighted, squares, plain = _finish_part(
                    logits, *shared,
                    TRANSFORM=TRANSFORM, STATS=STATS, WRITE_EXP=WRITE_EXP, PLAIN=True,
                )  # fmt: skip
            else:
                part_max, part_sum, weighted, squares, plain = _finish_part(
                    logits, *shared,
                    TRANSFORM=TRANSFORM, STATS=STATS, WRITE_EXP=WRITE_EXP, PLAIN=False,
                )  # fmt: skip
            maxima = maxima + (part_max,)
            sums = sums + (part_sum,)
            weighted_sums = weighted_sums + (weighted,)
            squared_sums = squared_sums + (squares,)
            plain_sums = plain_sums + (plain,)
        parts = first_part + block_v * PARTS + tl.arange(0, PARTS).to(tl.int64)
        # a part wholly past V has nothing to write
        mask = mask_n[:, None] & (v0 + tl.arange(0, PARTS) * PART_V < V)[None, :]
        _store_parts(part_max_ptr, maxima, parts, offs_n, mask, N, PARTS)
        _store_parts(part_sum_ptr, sums, parts, offs_n, mask, N, PARTS)
        if (ENTROPY & STATS) != 0:
            _store_parts(part_weighted_ptr, weighted_sums, parts, offs_n, mask, N, PARTS)
        if (SQUARES & STATS) != 0:
            _store_parts(part_squares_ptr, squared_sums, parts, offs_n, mask, N, PARTS)
        if (MEAN & STATS) != 0:
            _store_parts(part_plain_ptr, plain_sums, parts, offs_n, mask, N, PARTS)


def linear_logprob_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    partials: Partials,
    reference: torch.Tensor | None,
    exps: torch.Tensor | None,
    v_start: int,
    first_part: int,
    stats: int,
    write_exp: int,
    transform: Transform,
    tile: Tile,
) -> None:
    """Fill the partials of one weight slice.

    Assumes checked inputs on one device in one dtype, hidden ``[n, H]`` and weight ``[v, H]`` with
    a contiguous last axis, LoRA factors contiguous, ``partials`` of every statistic that ``stats``
    asks for, rows of ``exps`` that reach to the padded V.
    """
    n, H = hidden.shape
    V = weight.shape[0]
    tiles = cdiv(n, tile.block_n) * cdiv(V, tile.block_v)
    programs = min(tiles, program_count(hidden.device) * tile.programs_per_sm)
    with device_guard(hidden):
        _linear_logprob_fwd_kernel[(programs,)](
            hidden=operand(hidden, (tile.block_n, tile.block_h), tile),
            weight=operand(weight, (tile.block_v, tile.block_h), tile),
            bias_ptr=hidden if bias is None else bias,
            lora_a_ptr=hidden if lora_a is None else lora_a,
            lora_b_ptr=hidden if lora_b is None else lora_b,
            labels_ptr=labels,
            reference_ptr=partials.max if reference is None else reference,
            **partials.pointers(),
            exps_ptr=hidden if exps is None else exps,
            N=n,
            V=V,
            H=H,
            R=0 if lora_b is None else lora_b.shape[1],
            v_start=v_start,
            first_part=first_part,
            stride_hidden_n=hidden.stride(0),
            stride_weight_v=weight.stride(0),
            stride_exps_n=0 if exps is None else exps.stride(0),
            scale=transform.scale,
            softcap=transform.softcap,
            HAS_BIAS=bias is not None,
            HAS_LORA=lora_b is not None,
            TRANSFORM=transform.kind,
            STATS=stats,
            WRITE_EXP=write_exp,
            PRECISION=precision_of(hidden.dtype),
            USE_TMA=tile.tma,
            BLOCK_N=tile.block_n,
            BLOCK_V=tile.block_v,
            BLOCK_H=tile.block_h,
            BLOCK_R=tile.block_r,
            GROUP_N=tile.group_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )
