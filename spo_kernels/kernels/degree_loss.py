"""Forward of SPO's degree loss: per-level sums of hidden states, views, loss, gradient to the sums.

    sums[s, l]   = sum of the rows of segment s at level l                    [S, K, H]
    pooled[s, k] = mean over the rows view k keeps = sum_l A[k, l] sums[s, l]
    logits[s, k] = pooled[s, k] W^T + b, label k; loss[s] = mean over counted views
    level_grad[s, l] = sum_k A[k, l] grad_logits[s, k] W                      d loss / d a row
    head_grad[s] = (grad_logits^T pooled, sum_k grad_logits)                  d loss / d (W, b)

Symbols: N rows, S segments, K degrees, H hidden; A is the view matrix, centred or not. The rows are
cut into blocks of ROWS; a block meets the segments of its rows, and the pairs (block, segment) that
meet form a staircase, so ``block + segment`` is a slot of its own for each partial sum and nothing
about the segments is needed on the host. Which segments a block meets is looked up by a kernel of
its own: a row counter that comes out of a loop would hide from the compiler that rows are aligned,
and it would read them 2 bytes at a time. Partial sums are added in block order: no atomics, same
bits every run. All sums and products are fp32; hidden is exact in the one-hot product.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.kernels.device import INTERPRET, cdiv, device_guard, program_count

# K is at most 16, which is also the least tl.dot takes
BLOCK_K = 16
BLOCK_N = 32
BLOCK_H = 128
# segment offsets compared at a time while looking for the segment of a row
BLOCK_S = 64
# blocks looked up at a time
BLOCK_B = 32
NUM_WARPS = 4
# of the kernel that reads the hidden states: whole 128 bytes of a half-precision row, three tiles
# of them under way in each program
SUMS_BLOCK_H = 64
NUM_STAGES = 4
# programs a multiprocessor gets of the kernel that reads the hidden states: enough loads in flight,
# few enough blocks for the reduction after it
PROGRAMS_PER_SM = 4


@triton.jit
def _segments_before(rows, segment_offsets_ptr, S, BLOCK_S: tl.constexpr):
    """How many segments end at or before each of ``rows``, which is the segment of a row."""
    count = tl.zeros_like(rows)
    for start_s in range(0, S, BLOCK_S):
        offs_s = start_s + tl.arange(0, BLOCK_S)
        # [BLOCK_S], a segment that is not there ends after every row
        ends = tl.load(segment_offsets_ptr + 1 + offs_s, mask=offs_s < S, other=0x7FFFFFFFFFFFFFFF)
        count += tl.sum((ends[None, :] <= rows[:, None]).to(tl.int64), axis=1)
    return count


@triton.jit
def _views(counts, K, CENTER: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return (view matrix A [k, l], is_counted [k]) from the rows at each level [l]."""
    offs_k = tl.arange(0, BLOCK_K)[:, None]
    offs_l = tl.arange(0, BLOCK_K)[None, :]
    keeps = ((offs_l == 0) | (offs_l > offs_k)) & (offs_k < K) & (offs_l < K)
    kept_rows = tl.sum(tl.where(keeps, counts[None, :], 0.0), axis=1)
    removed_rows = tl.sum(tl.where(offs_l == offs_k, counts[None, :], 0.0), axis=1)
    is_first = tl.arange(0, BLOCK_K) == 0
    # a [1] tensor: the interpreter cannot spread a scalar bool
    has_key_content = tl.sum(tl.where(is_first, 0.0, counts), axis=0, keep_dims=True) > 0.0
    is_counted = (is_first | (removed_rows > 0.0)) & (kept_rows > 0.0) & has_key_content
    matrix = tl.where(keeps & is_counted[:, None], 1.0 / tl.maximum(kept_rows, 1.0)[:, None], 0.0)
    if CENTER:
        counted_views = tl.maximum(tl.sum(is_counted.to(tl.float32), axis=0), 1.0)
        mean = tl.sum(matrix, axis=0) / counted_views
        matrix = tl.where(is_counted[:, None], matrix - mean[None, :], 0.0)
    return matrix, is_counted


@triton.jit
def _degree_loss_fwd_blocks_kernel(
    segment_offsets_ptr,  # [S + 1] int64
    block_segments_ptr,  # [blocks, 2] int64, out: first and one past the last segment
    N,
    S,
    ROWS,
    blocks,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < blocks
    first_row = offs_b * ROWS
    last_row = tl.minimum(first_row + ROWS, N) - 1
    first = _segments_before(first_row, segment_offsets_ptr, S, BLOCK_S)
    last = _segments_before(last_row, segment_offsets_ptr, S, BLOCK_S)
    tl.store(block_segments_ptr + 2 * offs_b, first, mask=mask_b)
    tl.store(block_segments_ptr + 2 * offs_b + 1, tl.minimum(last + 1, S), mask=mask_b)


@triton.jit
def _degree_loss_fwd_sums_kernel(
    hidden_ptr,  # [N, H] bf16|fp16|fp32
    levels_ptr,  # [N] int8
    segment_offsets_ptr,  # [S + 1] int64
    block_segments_ptr,  # [blocks, 2] int64
    partial_sums_ptr,  # [slots, K, H] fp32, out
    partial_counts_ptr,  # [slots, BLOCK_K + 1] fp32, out: rows at each level, rows at a bad level
    N,
    K,
    H,
    ROWS,
    stride_hidden_n,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_h = tl.cdiv(H, BLOCK_H)
    block = (tl.program_id(0) // blocks_h).to(tl.int64)
    block_h = tl.program_id(0) % blocks_h
    first_row = block * ROWS
    end_row = tl.minimum(first_row + ROWS, N)
    offs_h = block_h * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    offs_k = tl.arange(0, BLOCK_K)

    first_segment = tl.load(block_segments_ptr + 2 * block)
    end_segment = tl.load(block_segments_ptr + 2 * block + 1)
    for segment in range(first_segment, end_segment):
        start = tl.maximum(tl.load(segment_offsets_ptr + segment), first_row)
        end = tl.minimum(tl.load(segment_offsets_ptr + segment + 1), end_row)
        acc_sums = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
        acc_counts = tl.zeros([BLOCK_K], tl.float32)
        acc_bad = tl.zeros([BLOCK_N], tl.float32)
        for row in range(start, end, BLOCK_N):
            offs_n = row + tl.arange(0, BLOCK_N).to(tl.int64)
            # [BLOCK_N]
            level = tl.load(levels_ptr + offs_n, mask=offs_n < end, other=-1).to(tl.int32)
            # [BLOCK_N, BLOCK_H]; rows of no response are not read, whatever they hold
            is_used = (level >= 0) & (level < K)
            hidden = tl.load(
                hidden_ptr + offs_n[:, None] * stride_hidden_n + offs_h[None, :],
                mask=is_used[:, None] & mask_h[None, :],
                other=0.0,
            )
            if INTERPRET:
                hidden = hidden.to(tl.float32)
            is_level = (offs_k[:, None] == level[None, :]) & is_used[None, :]
            acc_sums = tl.dot(is_level.to(hidden.dtype), hidden, acc_sums, input_precision="ieee")
            acc_counts += tl.sum(is_level.to(tl.float32), axis=1)
            acc_bad += ((level < -1) | (level >= K)).to(tl.float32)

        slot = block + segment
        tl.store(
            partial_sums_ptr + (slot * K + offs_k[:, None]) * H + offs_h[None, :],
            acc_sums,
            mask=(offs_k[:, None] < K) & mask_h[None, :],
        )
        if block_h == 0:
            counts_ptr = partial_counts_ptr + slot * (BLOCK_K + 1)
            tl.store(counts_ptr + offs_k, acc_counts)
            tl.store(counts_ptr + BLOCK_K, tl.sum(acc_bad, axis=0))


@triton.jit
def _degree_loss_fwd_pool_kernel(
    segment_offsets_ptr,  # [S + 1] int64
    partial_sums_ptr,  # [slots, K, H] fp32
    partial_counts_ptr,  # [slots, BLOCK_K + 1] fp32
    head_weight_ptr,  # [K, H]
    pooled_ptr,  # [S, K, H] fp32, out
    counts_ptr,  # [S, BLOCK_K + 1] fp32, out
    partial_logits_ptr,  # [S, blocks_h, BLOCK_K, BLOCK_K] fp32, out
    N,
    K,
    H,
    ROWS,
    CENTER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_h = tl.cdiv(H, BLOCK_H)
    segment = (tl.program_id(0) // blocks_h).to(tl.int64)
    block_h = tl.program_id(0) % blocks_h
    offs_h = block_h * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_k = tl.arange(0, BLOCK_K)
    mask_kh = (offs_k[:, None] < K) & (offs_h[None, :] < H)
    offs_kh = offs_k[:, None] * H + offs_h[None, :]

    start = tl.maximum(tl.load(segment_offsets_ptr + segment), 0)
    end = tl.minimum(tl.load(segment_offsets_ptr + segment + 1), N)
    acc_sums = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    acc_counts = tl.zeros([BLOCK_K], tl.float32)
    bad_rows = 0.0
    # an empty segment meets no block
    end_block = tl.where(start < end, (end - 1) // ROWS + 1, start // ROWS)
    for block in range(start // ROWS, end_block):
        slot = block + segment
        # [BLOCK_K, BLOCK_H]
        acc_sums += tl.load(partial_sums_ptr + slot * K * H + offs_kh, mask=mask_kh, other=0.0)
        acc_counts += tl.load(partial_counts_ptr + slot * (BLOCK_K + 1) + offs_k)
        bad_rows += tl.load(partial_counts_ptr + slot * (BLOCK_K + 1) + BLOCK_K)

    matrix, is_counted = _views(acc_counts, K, CENTER, BLOCK_K)
    pooled = tl.dot(matrix, acc_sums, input_precision="ieee")
    head_weight = tl.load(head_weight_ptr + offs_kh, mask=mask_kh, other=0.0).to(tl.float32)
    # [view, class]
    logits = tl.dot(pooled, tl.trans(head_weight), input_precision="ieee")
    tl.store(pooled_ptr + segment * K * H + offs_kh, pooled, mask=mask_kh)
    offs_kk = offs_k[:, None] * BLOCK_K + offs_k[None, :]
    tile = segment * blocks_h + block_h
    tl.store(partial_logits_ptr + tile * BLOCK_K * BLOCK_K + offs_kk, logits)
    if block_h == 0:
        tl.store(counts_ptr + segment * (BLOCK_K + 1) + offs_k, acc_counts)
        tl.store(counts_ptr + segment * (BLOCK_K + 1) + BLOCK_K, bad_rows)


@triton.jit
def _degree_loss_fwd_views_kernel(
    pooled_ptr,  # [S, K, H] fp32
    counts_ptr,  # [S, BLOCK_K + 1] fp32
    partial_logits_ptr,  # [S, blocks_h, BLOCK_K, BLOCK_K] fp32
    head_weight_ptr,  # [K, H]
    head_bias_ptr,  # [K], read if HAS_BIAS
    losses_ptr,  # [S] fp32, out
    correct_views_ptr,  # [S] int32, out
    counted_views_ptr,  # [S] int32, out
    view_mask_ptr,  # [S, K] bool, out
    level_grad_ptr,  # [S, K, H] fp32, out
    head_grad_ptr,  # [S, K * H + K] fp32, out: weight, then bias
    K,
    H,
    HAS_BIAS: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_h = tl.cdiv(H, BLOCK_H)
    segment = (tl.program_id(0) // blocks_h).to(tl.int64)
    block_h = tl.program_id(0) % blocks_h
    offs_h = block_h * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    mask_kh = mask_k[:, None] & (offs_h[None, :] < H)
    offs_kh = offs_k[:, None] * H + offs_h[None, :]
    offs_kk = offs_k[:, None] * BLOCK_K + offs_k[None, :]

    counts = tl.load(counts_ptr + segment * (BLOCK_K + 1) + offs_k)
    bad_rows = tl.load(counts_ptr + segment * (BLOCK_K + 1) + BLOCK_K)
    matrix, is_counted = _views(counts, K, CENTER, BLOCK_K)
    counted_views = tl.sum(is_counted.to(tl.int32), axis=0)

    # [view, class]; every program of the segment adds the same tiles in the same order
    logits = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    for other_block in range(0, blocks_h):
        tile = segment * blocks_h + other_block
        logits += tl.load(partial_logits_ptr + tile * BLOCK_K * BLOCK_K + offs_kk)
    if HAS_BIAS:
        bias = tl.load(head_bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        logits += bias[None, :]
    logits = tl.where(mask_k[None, :], logits, float("-inf"))
    row_max = tl.max(logits, axis=1)
    exps = tl.exp(logits - row_max[:, None])
    exp_sum = tl.sum(exps, axis=1)
    is_label = offs_k[:, None] == offs_k[None, :]
    target_logit = tl.sum(tl.where(is_label, logits, 0.0), axis=1)
    # the logits' difference first: a sum with the logarithm would round at the size of a logit
    view_loss = row_max - target_logit + tl.log(exp_sum)
    scale = 1.0 / tl.maximum(counted_views, 1).to(tl.float32)
    # the label's is minus the others' sum: p - 1 would round at the size of 1 where p nears it
    others = tl.where(is_label, 0.0, exps / exp_sum[:, None])
    grad_logits = tl.where(is_label, -tl.sum(others, axis=1)[:, None], others) * scale
    grad_logits = tl.where(is_counted[:, None] & mask_k[None, :], grad_logits, 0.0)

    # [class, BLOCK_H]
    head_weight = tl.load(head_weight_ptr + offs_kh, mask=mask_kh, other=0.0).to(tl.float32)
    grad_pooled = tl.dot(grad_logits, head_weight, input_precision="ieee")
    level_grad = tl.dot(tl.trans(matrix), grad_pooled, input_precision="ieee")
    tl.store(level_grad_ptr + segment * K * H + offs_kh, level_grad, mask=mask_kh)
    # [view, BLOCK_H]
    pooled = tl.load(pooled_ptr + segment * K * H + offs_kh, mask=mask_kh, other=0.0)
    head_grad = tl.dot(tl.trans(grad_logits), pooled, input_precision="ieee")
    head_grad_row = head_grad_ptr + segment * (K * H + K)
    tl.store(head_grad_row + offs_kh, head_grad, mask=mask_kh)

    if block_h == 0:
        tl.store(head_grad_row + K * H + offs_k, tl.sum(grad_logits, axis=0), mask=mask_k)
        loss = tl.sum(tl.where(is_counted, view_loss, 0.0), axis=0) * scale
        tl.store(losses_ptr + segment, tl.where(bad_rows > 0.0, float("nan"), loss))
        # the first maximum wins a tie
        top = tl.min(tl.where(logits == row_max[:, None], offs_k[None, :], BLOCK_K), axis=1)
        is_correct = (top == offs_k) & is_counted
        tl.store(correct_views_ptr + segment, tl.sum(is_correct.to(tl.int32), axis=0))
        tl.store(counted_views_ptr + segment, counted_views)
        tl.store(view_mask_ptr + segment * K + offs_k, is_counted, mask=mask_k)


def degree_loss_fwd(
    hidden: torch.Tensor,
    levels: torch.Tensor,
    segment_offsets: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    *,
    center_views: bool,
) -> tuple[torch.Tensor, ...]:
    """Return (losses, correct_views, counted_views, view_mask, level_grad, head_grad).

    Inputs are checked and on one device; strides are free.
    """
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    levels, segment_offsets = levels.contiguous(), segment_offsets.contiguous()
    head_weight = head_weight.contiguous()
    N, H = hidden.shape
    S, K = segment_offsets.numel() - 1, head_weight.shape[0]
    blocks_h = cdiv(H, BLOCK_H)
    programs = PROGRAMS_PER_SM * program_count(hidden.device)
    sums_blocks_h = cdiv(H, SUMS_BLOCK_H)
    rows = cdiv(max(N, 1) * sums_blocks_h, programs * BLOCK_N) * BLOCK_N
    blocks = cdiv(N, rows)
    slots = blocks + S

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    block_segments = empty(blocks, 2, dtype=torch.int64)
    partial_sums, partial_counts = empty(slots, K, H), empty(slots, BLOCK_K + 1)
    pooled, counts = empty(S, K, H), empty(S, BLOCK_K + 1)
    partial_logits = empty(S, blocks_h, BLOCK_K, BLOCK_K)
    losses, view_mask = empty(S), empty(S, K, dtype=torch.bool)
    correct_views, counted_views = empty(S, dtype=torch.int32), empty(S, dtype=torch.int32)
    level_grad, head_grad = empty(S, K, H), empty(S, K * H + K)
    outputs = losses, correct_views, counted_views, view_mask, level_grad, head_grad
    if S == 0:
        return outputs
    with device_guard(hidden):
        if N > 0:
            _degree_loss_fwd_blocks_kernel[(cdiv(blocks, BLOCK_B),)](
                segment_offsets_ptr=segment_offsets,
                block_segments_ptr=block_segments,
                N=N,
                S=S,
                ROWS=rows,
                blocks=blocks,
                BLOCK_B=BLOCK_B,
                BLOCK_S=BLOCK_S,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
            _degree_loss_fwd_sums_kernel[(blocks * sums_blocks_h,)](
                hidden_ptr=hidden,
                levels_ptr=levels,
                segment_offsets_ptr=segment_offsets,
                block_segments_ptr=block_segments,
                partial_sums_ptr=partial_sums,
                partial_counts_ptr=partial_counts,
                N=N,
                K=K,
                H=H,
                ROWS=rows,
                stride_hidden_n=hidden.stride(0),
                BLOCK_N=BLOCK_N,
                BLOCK_H=SUMS_BLOCK_H,
                BLOCK_K=BLOCK_K,
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
                enable_fp_fusion=True,
            )
        _degree_loss_fwd_pool_kernel[(S * blocks_h,)](
            segment_offsets_ptr=segment_offsets,
            partial_sums_ptr=partial_sums,
            partial_counts_ptr=partial_counts,
            head_weight_ptr=head_weight,
            pooled_ptr=pooled,
            counts_ptr=counts,
            partial_logits_ptr=partial_logits,
            N=N,
            K=K,
            H=H,
            ROWS=rows,
            CENTER=center_views,
            BLOCK_H=BLOCK_H,
            BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
        _degree_loss_fwd_views_kernel[(S * blocks_h,)](
            pooled_ptr=pooled,
            counts_ptr=counts,
            partial_logits_ptr=partial_logits,
            head_weight_ptr=head_weight,
            head_bias_ptr=None if head_bias is None else head_bias.contiguous(),
            losses_ptr=losses,
            correct_views_ptr=correct_views,
            counted_views_ptr=counted_views,
            view_mask_ptr=view_mask,
            level_grad_ptr=level_grad,
            head_grad_ptr=head_grad,
            K=K,
            H=H,
            HAS_BIAS=head_bias is not None,
            CENTER=center_views,
            BLOCK_H=BLOCK_H,
            BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return outputs
