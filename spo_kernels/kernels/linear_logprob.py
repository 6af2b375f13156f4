"""Fused forward of ``linear_logprob``: logits tile, row statistics, kept exponentials.

    z = cap((h W^T + bias + a b^T) * logit_scale) / temperature     one tile, never rounded
    per sub-tile: m = max z, s = sum_{v != y} exp(z - m), sum exp(z - m) z, sum exp(z - m)^2, sum z

Symbols: N rows, V vocab, H hidden, R LoRA rank, S sub-tiles of the vocabulary. One program of the
forward owns BLOCK_N x BLOCK_V logits at a time and walks the grid with a stride (persistent); the
accumulator is finished in SUB_TILES column pieces so that its epilogue stays in registers. Products
accumulate in fp32. The exponentials are kept, 0 at the label, relative to one reference a row
(bf16 and fp32, ready for a product) or to a power of two above their sub-tile's maximum
(fp16, which has no exponent range; rescaling by powers of two is exact there).
"""

import torch
import triton
import triton.language as tl

from spo_kernels.kernels.device import cdiv, device_guard, program_count, round_to
from spo_kernels.kernels.logits_tile import (
    ENTROPY,
    FP16_GAIN,
    LOG2E,
    MEAN,
    REFERENCE_SLACK,
    ROW_REFERENCE,
    SQUARES,
    TOP1,
    local_label,
    logits_tile,
    operand,
    padded,
    precision_of,
    sub_tiles_of,
    tile_of,
    transform,
)
from spo_kernels.kernels.tiles import Tile


@triton.jit
def _finish_sub_tile(
    acc,
    v0,
    sub,
    offs_n,
    mask_n,
    bias_ptr,
    labels_ptr,
    reference_ptr,
    part_max_ptr,
    part_sum_ptr,
    part_weighted_ptr,
    part_squares_ptr,
    part_plain_ptr,
    target_ptr,
    top1_ptr,
    exps_ptr,
    N,
    V,
    v_start,
    stride_exps_n,
    scale,
    softcap,
    inv_t,
    HAS_BIAS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    STATS: tl.constexpr,
    WRITE_EXP: tl.constexpr,
):
    SUB_V: tl.constexpr = acc.shape[1]
    # 32-bit columns inside the sub-tile keep the epilogue out of 64-bit arithmetic
    cols = tl.arange(0, SUB_V)
    mask_v = cols < V - v0
    z, slope = transform(
        acc, bias_ptr + v0, cols, mask_v, scale, softcap, inv_t, HAS_BIAS, TRANSFORM
    )
    label = local_label(labels_ptr, offs_n, mask_n, v_start + v0, SUB_V)
    hit = cols[None, :] == label[:, None]
    out = sub.to(tl.int64) * N + offs_n
    if (MEAN & STATS) != 0:
        plain = tl.sum(tl.where(mask_v[None, :], z, 0.0), 1)
        tl.store(part_plain_ptr + out, plain, mask=mask_n)
    # columns past V lose again here what the softcap gave them
    z = tl.where(mask_v[None, :], z, float("-inf"))
    part_max = tl.max(z, 1)
    own = tl.where(part_max == float("-inf"), 0.0, part_max)
    e = tl.exp2((z - own[:, None]) * LOG2E)
    # the label's own term is added from its logit: 1 - p_label must not cancel
    others = tl.where(hit, 0.0, e)
    tl.store(part_max_ptr + out, part_max, mask=mask_n)
    tl.store(part_sum_ptr + out, tl.sum(others, 1), mask=mask_n)
    if (ENTROPY & STATS) != 0:
        weighted = tl.sum(tl.where(z == float("-inf"), 0.0, e * z), 1)
        tl.store(part_weighted_ptr + out, weighted, mask=mask_n)
    if (SQUARES & STATS) != 0:
        tl.store(part_squares_ptr + out, tl.sum(e * e, 1), mask=mask_n)
    # exactly one sub-tile owns a label, so this store has one writer
    owns = mask_n & (label >= 0) & (label < V - v0)
    if tl.sum(owns.to(tl.int32), 0) > 0:
        target = tl.sum(tl.where(hit, z, 0.0), 1)
        tl.store(target_ptr + offs_n, target, mask=owns)
        if (TOP1 & STATS) != 0:
            ahead = (z > target[:, None]) | (
                (z == target[:, None]) & (cols[None, :] < label[:, None])
            )
            beaten = tl.max(ahead.to(tl.int32), 1)
            # how many sub-tiles stand before this one, or -1 - that if the label loses in its own
            place = tl.where(beaten == 0, sub, -1 - sub)
            tl.store(top1_ptr + offs_n, place, mask=owns)
    if WRITE_EXP != 0:
        gain = FP16_GAIN * tl.exp2(own * LOG2E - tl.ceil(own * LOG2E))
        if WRITE_EXP == ROW_REFERENCE:
            reference = tl.load(reference_ptr + offs_n, mask=mask_n, other=0.0)
            far = part_max > reference + REFERENCE_SLACK
            gain = tl.where(far, 1.0, tl.exp2((own - reference) * LOG2E))
        # an exponential of 0 stays 0 whatever its row's reference
        kept = tl.where(others == 0.0, 0.0, others * slope * gain[:, None])
        tl.store(
            exps_ptr + v0 + offs_n[:, None] * stride_exps_n + cols[None, :],
            round_to(kept, exps_ptr.dtype.element_ty),
            mask=mask_n[:, None] & (cols < padded(V) - v0)[None, :],
        )


@triton.jit
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
    top1_ptr,  # [N] int32, out: sub-tile of the label, -1 - sub-tile where it loses there
    exps_ptr,  # [N, V] out, 0 up to the padded V
    N,
    V,
    H,
    R,
    v_start,
    first_sub,
    stride_hidden_n,
    stride_weight_v,
    stride_exps_n,
    scale,
    softcap,
    inv_t,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    TRANSFORM: tl.constexpr,
    STATS: tl.constexpr,
    WRITE_EXP: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
    SUB_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    SUB_V: tl.constexpr = BLOCK_V // SUB_TILES
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
        pieces = sub_tiles_of(acc_logits, SUB_TILES)
        for i in tl.static_range(SUB_TILES):
            # a sub-tile wholly past V has no partial to write
            if v0 + i * SUB_V < V:
                _finish_sub_tile(
                    pieces[i], v0 + i * SUB_V, first_sub + block_v * SUB_TILES + i, offs_n, mask_n,
                    bias_ptr, labels_ptr, reference_ptr, part_max_ptr, part_sum_ptr,
                    part_weighted_ptr, part_squares_ptr, part_plain_ptr, target_ptr, top1_ptr,
                    exps_ptr, N, V, v_start, stride_exps_n, scale, softcap, inv_t,
                    HAS_BIAS, TRANSFORM, STATS, WRITE_EXP,
                )  # fmt: skip


def linear_logprob_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    parts: dict[str, torch.Tensor],
    reference: torch.Tensor | None,
    exps: torch.Tensor | None,
    v_start: int,
    first_sub: int,
    stats: int,
    write_exp: int,
    transform_kind: int,
    scale: float,
    softcap: float,
    inv_t: float,
    tile: Tile,
) -> None:
    """Fill the partials of one weight slice.

    Assumes checked inputs on one device in one dtype, hidden ``[n, H]`` and weight ``[v, H]`` with
    a contiguous last axis, LoRA factors contiguous, ``parts`` holding every partial that ``stats``
    asks for, rows of ``exps`` that reach to the padded V.
    """
    n, H = hidden.shape
    V = weight.shape[0]
    tiles = cdiv(n, tile.block_n) * cdiv(V, tile.block_v)
    # pointers a switch turns off still need a tensor of the right dtype
    nothing = parts["max"]
    programs = min(tiles, program_count(hidden.device) * tile.programs_per_sm)
    with device_guard(hidden):
        _linear_logprob_fwd_kernel[(programs,)](
            hidden=operand(hidden, (tile.block_n, tile.block_h), tile),
            weight=operand(weight, (tile.block_v, tile.block_h), tile),
            bias_ptr=hidden if bias is None else bias,
            lora_a_ptr=hidden if lora_a is None else lora_a,
            lora_b_ptr=hidden if lora_b is None else lora_b,
            labels_ptr=labels,
            reference_ptr=nothing if reference is None else reference,
            part_max_ptr=parts["max"],
            part_sum_ptr=parts["sum"],
            part_weighted_ptr=parts.get("weighted", nothing),
            part_squares_ptr=parts.get("squares", nothing),
            part_plain_ptr=parts.get("plain", nothing),
            target_ptr=parts["target"],
            top1_ptr=parts["top1"],
            exps_ptr=hidden if exps is None else exps,
            N=n,
            V=V,
            H=H,
            R=0 if lora_b is None else lora_b.shape[1],
            v_start=v_start,
            first_sub=first_sub,
            stride_hidden_n=hidden.stride(0),
            stride_weight_v=weight.stride(0),
            stride_exps_n=0 if exps is None else exps.stride(0),
            scale=scale,
            softcap=softcap,
            inv_t=inv_t,
            HAS_BIAS=bias is not None,
            HAS_LORA=lora_b is not None,
            TRANSFORM=transform_kind,
            STATS=stats,
            WRITE_EXP=write_exp,
            PRECISION=precision_of(hidden.dtype),
            USE_TMA=tile.tma,
            SUB_TILES=tile.sub_tiles,
            BLOCK_N=tile.block_n,
            BLOCK_V=tile.block_v,
            BLOCK_H=tile.block_h,
            BLOCK_R=tile.block_r,
            GROUP_N=tile.group_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
            num_stages=tile.num_stages,
        )
