"""Backward of the unpaired losses to flat tokens: each takes its response's gradient.

    grad_logps[n] = grad_losses[s] grads[s]            s: response of token n; 0 outside every one

Symbols: S responses, N tokens. One program owns BLOCK_N tokens and looks their responses up; the
product is fp32. Sums and rows of tokens need no kernel: there the backward is one multiply.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.kernels.device import cdiv, device_guard

BLOCK_N = 1024
NUM_WARPS = 4


@triton.jit
def _unpaired_preference_loss_bwd_tokens_kernel(
    grads_ptr,  # [S] fp32
    grad_losses_ptr,  # [S]
    segment_offsets_ptr,  # [S + 1] int64
    grad_logps_ptr,  # [N], out
    S,
    N,
    SEARCH_STEPS,
    stride_grad_losses_s,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    # how many segments end at or before a token, by bisection, is the segment of the token
    segment = tl.zeros([BLOCK_N], tl.int64)
    high = segment + S
    for _ in range(0, SEARCH_STEPS):
        is_open = segment < high
        middle = (segment + high) // 2
        end = tl.load(segment_offsets_ptr + 1 + middle, mask=is_open, other=0)
        has_ended = end <= offs_n
        segment = tl.where(is_open & has_ended, middle + 1, segment)
        high = tl.where(is_open & (end > offs_n), middle, high)
    is_used = mask_n & (segment < S) & (offs_n >= tl.load(segment_offsets_ptr))
    # [BLOCK_N]
    grad = tl.load(grads_ptr + segment, mask=is_used, other=0.0)
    upstream_ptr = grad_losses_ptr + segment * stride_grad_losses_s
    grad = grad * tl.load(upstream_ptr, mask=is_used, other=0.0).to(tl.float32)
    tl.store(grad_logps_ptr + offs_n, grad.to(grad_logps_ptr.dtype.element_ty), mask=mask_n)


def unpaired_preference_loss_bwd_tokens(
    grads: torch.Tensor,
    grad_losses: torch.Tensor,
    segment_offsets: torch.Tensor,
    *,
    tokens: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return grad_logps [N]: each token takes its response's gradient, 0 outside every one."""
    S = grads.numel()
    grad_logps = torch.empty(tokens, dtype=dtype, device=grads.device)
    if tokens == 0:
        return grad_logps
    with device_guard(grads):
        _unpaired_preference_loss_bwd_tokens_kernel[(cdiv(tokens, BLOCK_N),)](
            grads_ptr=grads,
            grad_losses_ptr=grad_losses,
            segment_offsets_ptr=segment_offsets.contiguous(),
            grad_logps_ptr=grad_logps,
            S=S,
            N=tokens,
            SEARCH_STEPS=S.bit_length(),
            stride_grad_losses_s=grad_losses.stride(0),
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return grad_logps
