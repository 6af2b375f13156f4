"""Backward of SPO's degree loss: rows gather their level's gradient, segments add up the head's.

    grad_hidden[n] = grad_losses[s] level_grad[s, l]          s, l: segment and level of row n
    grad_head      = sum_s grad_losses[s] head_grad[s]        in the order of s

Symbols: N rows, S segments, K degrees, H hidden, M = K H + K elements of the head's gradient. One
program owns BLOCK_N rows x BLOCK_H columns, or BLOCK_M elements; products and sums are fp32.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.kernels.degree_loss import BLOCK_S, _segments_before
from spo_kernels.kernels.device import cdiv, device_guard

BLOCK_N = 32
BLOCK_H = 128
BLOCK_M = 512
NUM_WARPS = 4


@triton.jit
def _degree_loss_bwd_hidden_kernel(
    levels_ptr,  # [N] int8
    segment_offsets_ptr,  # [S + 1] int64
    level_grad_ptr,  # [S, K, H] fp32
    grad_losses_ptr,  # [S]
    grad_hidden_ptr,  # [N, H], out
    N,
    S,
    K,
    H,
    stride_grad_losses_s,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    blocks_h = tl.cdiv(H, BLOCK_H)
    block_n = (tl.program_id(0) // blocks_h).to(tl.int64)
    block_h = tl.program_id(0) % blocks_h
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_h = block_h * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H

    # [BLOCK_N]
    level = tl.load(levels_ptr + offs_n, mask=mask_n, other=-1).to(tl.int64)
    segment = _segments_before(offs_n, segment_offsets_ptr, S, BLOCK_S)
    first_row = tl.load(segment_offsets_ptr)
    is_used = (level >= 0) & (level < K) & (segment < S) & (offs_n >= first_row)
    upstream = tl.load(grad_losses_ptr + segment * stride_grad_losses_s, mask=is_used, other=0.0)
    # [BLOCK_N, BLOCK_H]
    grad = tl.load(
        level_grad_ptr + (segment * K + level)[:, None] * H + offs_h[None, :],
        mask=is_used[:, None] & mask_h[None, :],
        other=0.0,
    )
    grad = grad * upstream.to(tl.float32)[:, None]
    tl.store(
        grad_hidden_ptr + offs_n[:, None] * H + offs_h[None, :],
        grad.to(grad_hidden_ptr.dtype.element_ty),
        mask=mask_n[:, None] & mask_h[None, :],
    )


@triton.jit
def _degree_loss_bwd_head_kernel(
    head_grad_ptr,  # [S, M] fp32
    grad_losses_ptr,  # [S]
    grad_head_ptr,  # [M], out
    S,
    M,
    stride_grad_losses_s,
    BLOCK_M: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    acc_grad = tl.zeros([BLOCK_M], tl.float32)
    for segment in range(0, S):
        row = tl.cast(segment, tl.int64)
        upstream = tl.load(grad_losses_ptr + row * stride_grad_losses_s).to(tl.float32)
        # [BLOCK_M]
        grad = tl.load(head_grad_ptr + row * M + offs_m, mask=mask_m, other=0.0)
        acc_grad += upstream * grad
    tl.store(grad_head_ptr + offs_m, acc_grad.to(grad_head_ptr.dtype.element_ty), mask=mask_m)


def degree_loss_bwd_hidden(
    levels: torch.Tensor,
    segment_offsets: torch.Tensor,
    level_grad: torch.Tensor,
    grad_losses: torch.Tensor,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return grad_hidden [N, H]: each row takes its level's gradient, scaled by its segment's."""
    levels, segment_offsets = levels.contiguous(), segment_offsets.contiguous()
    N = levels.numel()
    S, K, H = level_grad.shape
    grad_hidden = torch.empty(N, H, dtype=dtype, device=levels.device)
    if N == 0:
        return grad_hidden
    with device_guard(levels):
        _degree_loss_bwd_hidden_kernel[(cdiv(N, BLOCK_N) * cdiv(H, BLOCK_H),)](
            levels_ptr=levels,
            segment_offsets_ptr=segment_offsets,
            level_grad_ptr=level_grad,
            grad_losses_ptr=grad_losses,
            grad_hidden_ptr=grad_hidden,
            N=N,
            S=S,
            K=K,
            H=H,
            stride_grad_losses_s=grad_losses.stride(0),
            BLOCK_N=BLOCK_N,
            BLOCK_H=BLOCK_H,
            BLOCK_S=BLOCK_S,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return grad_hidden


def degree_loss_bwd_head(
    head_grad: torch.Tensor, grad_losses: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor:
    """Return the head's gradient [K * H + K], weight then bias, summed over segments in order."""
    S, M = head_grad.shape
    grad_head = torch.empty(M, dtype=dtype, device=head_grad.device)
    with device_guard(head_grad):
        _degree_loss_bwd_head_kernel[(cdiv(M, BLOCK_M),)](
            head_grad_ptr=head_grad,
            grad_losses_ptr=grad_losses,
            grad_head_ptr=grad_head,
            S=S,
            M=M,
            stride_grad_losses_s=grad_losses.stride(0),
            BLOCK_M=BLOCK_M,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return grad_head
