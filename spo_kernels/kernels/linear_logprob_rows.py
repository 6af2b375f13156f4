"""Row reductions of ``linear_logprob``: logsumexp and statistics, rescale, the direction's finish.

    others    = sum_t s_t exp(m_t - M)                  over parts t in fixed order, y left out
    logsumexp = M + log(others + exp(z_y - M));  rest = 1 - p_y = others / (others + exp(z_y - M))
    D         = rest slope_y W[y] - slope factor (exps W)

Symbols: N rows, V vocab, H hidden, S parts of the vocabulary. All arithmetic is fp32.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.calls.layout import PART_V
from spo_kernels.kernels.device import cdiv, device_guard, round_to
from spo_kernels.kernels.logits_tile import (
    ENTROPY,
    FP16_GAIN,
    LOG2E,
    MEAN,
    OWN_REFERENCE,
    REFERENCE_SLACK,
    ROW_REFERENCE,
    SQUARES,
    TOP1,
    Partials,
    padded,
)


# N must not pick the layout of the sums: a row's bits may not depend on the rows beside it
@triton.jit(do_not_specialize=["N"])
def _linear_logprob_reduce_kernel(
    part_max_ptr,  # [S, N] fp32
    part_sum_ptr,  # [S, N] fp32
    part_weighted_ptr,  # [S, N] fp32
    part_squares_ptr,  # [S, N] fp32
    part_plain_ptr,  # [S, N] fp32
    target_ptr,  # [N] fp32
    top1_ptr,  # [N] int32
    reference_ptr,  # [N] fp32
    logsumexp_ptr,  # [N] fp32, out
    logps_ptr,  # [N] fp32, out
    rest_ptr,  # [N] fp32, out: 1 - p_label
    entropy_ptr,  # [N] fp32, out
    squares_ptr,  # [N] fp32, out: log sum p^2
    mean_ptr,  # [N] fp32, out
    is_top1_ptr,  # [N] bool, out
    row_max_ptr,  # [N] fp32, out
    factor_ptr,  # [N] fp32, out: p = factor * exps after the rescale
    N,
    V,
    S,
    STATS: tl.constexpr,
    WRITE_EXP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=0.0)
    row_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    acc_others = tl.zeros((BLOCK_N,), tl.float32)
    acc_weighted = tl.zeros((BLOCK_N,), tl.float32)
    acc_squares = tl.zeros((BLOCK_N,), tl.float32)
    acc_plain = tl.zeros((BLOCK_N,), tl.float32)
    beaten = tl.zeros((BLOCK_N,), tl.int32)
    place = tl.zeros((BLOCK_N,), tl.int32)
    if (TOP1 & STATS) != 0:
        place = tl.load(top1_ptr + offs_n, mask=mask_n, other=0)
    for s0 in range(0, S, BLOCK_S):
        offs_s = s0 + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = (offs_s < S)[:, None] & mask_n[None, :]
        offs = offs_s[:, None] * N + offs_n[None, :]
        # [BLOCK_S, BLOCK_N]
        part_max = tl.load(part_max_ptr + offs, mask=mask, other=float("-inf"))
        part_sum = tl.load(part_sum_ptr + offs, mask=mask, other=0.0)
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        keep = tl.exp2((row_max - shift) * LOG2E)
        weight = tl.exp2((part_max - shift[None, :]) * LOG2E)
        acc_others = acc_others * keep + tl.sum(part_sum * weight, 0)
        if (ENTROPY & STATS) != 0:
            part = tl.load(part_weighted_ptr + offs, mask=mask, other=0.0)
            acc_weighted = acc_weighted * keep + tl.sum(part * weight, 0)
        if (SQUARES & STATS) != 0:
            part = tl.load(part_squares_ptr + offs, mask=mask, other=0.0)
            acc_squares = acc_squares * keep * keep + tl.sum(part * weight * weight, 0)
        if (MEAN & STATS) != 0:
            acc_plain += tl.sum(tl.load(part_plain_ptr + offs, mask=mask, other=0.0), 0)
        if (TOP1 & STATS) != 0:
            # the first maximum wins a tie: earlier parts must be lower, later ones not higher
            before = offs_s[:, None] < place[None, :]
            after = offs_s[:, None] > place[None, :]
            wins = (before & (part_max >= target[None, :])) | (after & (part_max > target[None, :]))
            beaten = tl.maximum(beaten, tl.max((wins & mask).to(tl.int32), 0))
        row_max = new_max
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    own = tl.exp2((target - shift) * LOG2E)
    total = acc_others + own
    logsumexp = row_max + tl.log(total)
    # a label that outweighs the rest has a log-prob near 0, which a difference would blur
    logps = tl.where(own > acc_others, -tl.log(1.0 + acc_others / own), target - logsumexp)
    tl.store(logsumexp_ptr + offs_n, logsumexp, mask=mask_n)
    tl.store(logps_ptr + offs_n, logps, mask=mask_n)
    tl.store(rest_ptr + offs_n, acc_others / total, mask=mask_n)
    if (ENTROPY & STATS) != 0:
        tl.store(entropy_ptr + offs_n, logsumexp - acc_weighted / total, mask=mask_n)
    if (SQUARES & STATS) != 0:
        value = tl.log(acc_squares) - 2.0 * tl.log(total)
        tl.store(squares_ptr + offs_n, value, mask=mask_n)
    if (MEAN & STATS) != 0:
        tl.store(mean_ptr + offs_n, acc_plain / V, mask=mask_n)
    if (TOP1 & STATS) != 0:
        wins = (beaten == 0) & (place >= 0) & (logps == logps)
        tl.store(is_top1_ptr + offs_n, wins, mask=mask_n)
    if WRITE_EXP == ROW_REFERENCE:
        tl.store(row_max_ptr + offs_n, row_max, mask=mask_n)
        reference = tl.load(reference_ptr + offs_n, mask=mask_n, other=0.0)
        # rows with a far part are brought to their logsumexp by the rescale
        far = row_max > reference + REFERENCE_SLACK
        factor = tl.where(far, 1.0, tl.exp2((reference - logsumexp) * LOG2E))
        tl.store(factor_ptr + offs_n, factor, mask=mask_n)
    if WRITE_EXP == OWN_REFERENCE:
        factor = tl.exp2(tl.ceil(logsumexp * LOG2E) - logsumexp * LOG2E) / FP16_GAIN
        tl.store(factor_ptr + offs_n, factor, mask=mask_n)


@triton.jit(do_not_specialize=["N", "V"])
def _linear_logprob_rescale_kernel(
    exps_ptr,  # [N, V] compute dtype, in place
    part_max_ptr,  # [S, N] fp32
    reference_ptr,  # [N] fp32
    row_max_ptr,  # [N] fp32
    logsumexp_ptr,  # [N] fp32
    N,
    V,
    stride_exps_n,
    WRITE_EXP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # nearly always no row is far and a program ends at once: few programs, each of many parts
    offs_n = (tl.program_id(0) // SPLITS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    logsumexp = tl.load(logsumexp_ptr + offs_n, mask=mask_n, other=0.0)
    todo = mask_n
    reference = tl.zeros((BLOCK_N,), tl.float32)
    if WRITE_EXP == ROW_REFERENCE:
        reference = tl.load(reference_ptr + offs_n, mask=mask_n, other=0.0)
        row_max = tl.load(row_max_ptr + offs_n, mask=mask_n, other=float("-inf"))
        todo = mask_n & (row_max > reference + REFERENCE_SLACK)
    if tl.sum(todo.to(tl.int32), 0) > 0:
        split = tl.program_id(0) % SPLITS
        for i in range(0, tl.cdiv(tl.cdiv(V, BLOCK_V) - split, SPLITS)):
            part = split + i * SPLITS
            part_max = tl.load(
                part_max_ptr + part.to(tl.int64) * N + offs_n, mask=todo, other=float("-inf")
            )
            own = tl.where(part_max == float("-inf"), 0.0, part_max)
            if WRITE_EXP == ROW_REFERENCE:
                own = tl.where(part_max > reference + REFERENCE_SLACK, own, reference)
                factor = tl.exp2((own - logsumexp) * LOG2E)
            else:
                factor = tl.exp2(tl.ceil(own * LOG2E) - tl.ceil(logsumexp * LOG2E))
            offs_v = part * BLOCK_V + tl.arange(0, BLOCK_V)
            mask = todo[:, None] & (offs_v < padded(V))[None, :]
            offs = offs_n[:, None] * stride_exps_n + offs_v[None, :]
            kept = tl.load(exps_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            # a row reference of -inf meets only exponentials of 0
            kept = tl.where(kept == 0.0, 0.0, kept * factor[:, None])
            tl.store(exps_ptr + offs, round_to(kept, exps_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _direction(row_ptr, offs_h, mask_h, stride_h, gain, factor, sums, COMPUTE_DTYPE: tl.constexpr):
    # an fp32 head under autocast counts as rounded here too
    head = tl.load(row_ptr + offs_h * stride_h, mask=mask_h, other=0.0).to(tl.float32)
    return gain * round_to(head, COMPUTE_DTYPE).to(tl.float32) - factor * sums


@triton.jit
def _linear_logprob_direction_kernel(
    sums_ptr,  # [N, H] fp32: exps W
    head_ptr,  # [V, H]
    labels_ptr,  # [N] int64
    factor_ptr,  # [N] fp32: p = factor * exps
    gain_ptr,  # [N] fp32: (1 - p_label) * dz/dz0 at the label
    out_ptr,  # [N, H] fp16 or fp32, out
    scale_ptr,  # [N] fp32, out: the row's scale
    V,
    H,
    stride_head_v,
    stride_head_h,
    slope,
    COMPUTE_DTYPE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    # a label outside [0, V) reads row 0: its gain is NaN, so the result is
    label = tl.load(labels_ptr + n)
    label = tl.where((label >= 0) & (label < V), label, 0)
    factor = tl.load(factor_ptr + n) * slope
    gain = tl.load(gain_ptr + n)
    scale = 1.0
    if SCALE_ROWS:
        largest = tl.zeros((BLOCK_H,), tl.float32)
        for h0 in range(0, H, BLOCK_H):
            offs_h = h0 + tl.arange(0, BLOCK_H).to(tl.int64)
            mask_h = offs_h < H
            sums = tl.load(sums_ptr + n * H + offs_h, mask=mask_h, other=0.0)
            value = _direction(
                head_ptr + label * stride_head_v, offs_h, mask_h, stride_head_h, gain, factor, sums,
                COMPUTE_DTYPE,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.abs(value))
        largest_all = tl.max(largest, 0)
        # the largest entry is stored as 1: fp16 keeps 11 bits of every entry down to 6e-5 of it
        scale = tl.where(largest_all > 0.0, largest_all, 1.0)
    tl.store(scale_ptr + n, scale)
    for h0 in range(0, H, BLOCK_H):
        offs_h = h0 + tl.arange(0, BLOCK_H).to(tl.int64)
        mask_h = offs_h < H
        sums = tl.load(sums_ptr + n * H + offs_h, mask=mask_h, other=0.0)
        value = _direction(
            head_ptr + label * stride_head_v, offs_h, mask_h, stride_head_h, gain, factor, sums,
            COMPUTE_DTYPE,
        )  # fmt: skip
        tl.store(
            out_ptr + n * H + offs_h, (value / scale).to(out_ptr.dtype.element_ty), mask=mask_h
        )


REDUCE_BLOCK_S = 64
REDUCE_BLOCK_N = 16


def linear_logprob_reduce(
    partials: Partials,
    reference: torch.Tensor | None,
    out: dict[str, torch.Tensor],
    *,
    row_max: torch.Tensor | None,
    factor: torch.Tensor | None,
    vocab_size: int,
    stats: int,
    write_exp: int,
) -> None:
    """Reduce the partials of every part in fixed order into the row outputs ``out``.

    ``row_max`` and ``factor`` are written where exponentials are kept.
    """
    parts, n = partials.max.shape
    nothing = partials.max
    with device_guard(nothing):
        _linear_logprob_reduce_kernel[(cdiv(n, REDUCE_BLOCK_N),)](
            **partials.pointers(),
            reference_ptr=nothing if reference is None else reference,
            logsumexp_ptr=out["logsumexp"],
            logps_ptr=out["logps"],
            rest_ptr=out["rest"],
            entropy_ptr=out.get("entropy", nothing),
            squares_ptr=out.get("log_sum_sq_probs", nothing),
            mean_ptr=out.get("mean_logits", nothing),
            is_top1_ptr=out.get("is_top1", nothing),
            row_max_ptr=nothing if row_max is None else row_max,
            factor_ptr=nothing if factor is None else factor,
            N=n,
            V=vocab_size,
            S=parts,
            STATS=stats,
            WRITE_EXP=write_exp,
            BLOCK_S=REDUCE_BLOCK_S,
            BLOCK_N=REDUCE_BLOCK_N,
            num_warps=4,
            enable_fp_fusion=True,
        )


RESCALE_BLOCK_N = 32
# programs that share a block of rows
RESCALE_SPLITS = 16


def linear_logprob_rescale(
    exps: torch.Tensor,
    part_max: torch.Tensor,
    reference: torch.Tensor | None,
    row_max: torch.Tensor,
    logsumexp: torch.Tensor,
    *,
    write_exp: int,
) -> None:
    """Bring kept exponentials of one weight slice to their row's logsumexp where that is needed.

    Assumes rows of ``exps`` that reach to the padded V.
    """
    n, V = exps.shape
    with device_guard(exps):
        _linear_logprob_rescale_kernel[(cdiv(n, RESCALE_BLOCK_N) * RESCALE_SPLITS,)](
            exps_ptr=exps,
            part_max_ptr=part_max,
            reference_ptr=row_max if reference is None else reference,
            row_max_ptr=row_max,
            logsumexp_ptr=logsumexp,
            N=n,
            V=V,
            stride_exps_n=exps.stride(0),
            WRITE_EXP=write_exp,
            BLOCK_N=RESCALE_BLOCK_N,
            BLOCK_V=PART_V,
            SPLITS=RESCALE_SPLITS,
            num_warps=4,
            enable_fp_fusion=True,
        )


DIRECTION_BLOCK_H = 1024
_TL_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


def linear_logprob_direction(
    sums: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    factor: torch.Tensor,
    gain: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    *,
    slope: float,
    compute_dtype: torch.dtype,
) -> None:
    """Finish ``gain W[y] - slope factor (exps W)``; ``sums`` and ``out`` are contiguous [n, H]."""
    n, H = sums.shape
    with device_guard(sums):
        _linear_logprob_direction_kernel[(n,)](
            sums_ptr=sums,
            head_ptr=head,
            labels_ptr=labels,
            factor_ptr=factor,
            gain_ptr=gain,
            out_ptr=out,
            scale_ptr=scale,
            V=head.shape[0],
            H=H,
            stride_head_v=head.stride(0),
            stride_head_h=head.stride(1),
            slope=slope,
            COMPUTE_DTYPE=_TL_DTYPES[compute_dtype],
            SCALE_ROWS=out.dtype == torch.float16,
            BLOCK_H=min(DIRECTION_BLOCK_H, triton.next_power_of_2(H)),
            num_warps=4,
            enable_fp_fusion=True,
        )
