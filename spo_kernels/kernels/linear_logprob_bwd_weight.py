"""The head's gradient from a gradient tile, rounded once: ``grad_weight = scale grad^T hidden``.

Symbols: N rows, V vocab (one slice of it), H hidden. One program owns BLOCK_V x BLOCK_H entries at
a time, sums all rows in fp32 and writes its dtype. A library's product would be written in fp32 and
cast, since with rounded output it may add the parts of a split sum in half precision: 10 bytes an
entry against 2, which at 2048 rows is a third of the product's time. With many rows the product is
everything, and the library's is the faster one.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.kernels.device import INTERPRET, cdiv, device_guard, program_count, round_to
from spo_kernels.kernels.logits_tile import operand, tile_of
from spo_kernels.kernels.tiles import Tile


@triton.jit(do_not_specialize=["N", "V"])
def _linear_logprob_bwd_weight_kernel(
    grad,  # [N, V] pointer or descriptor
    hidden,  # [N, H] pointer or descriptor
    scale_ptr,  # [] fp32
    grad_weight_ptr,  # [V, H] out
    N,
    V,
    H,
    stride_grad_n,
    stride_hidden_n,
    stride_grad_weight_v,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_V: tl.constexpr,
):
    tiles_v = tl.cdiv(V, BLOCK_V)
    tiles_h = tl.cdiv(H, BLOCK_H)
    scale = tl.load(scale_ptr)
    for tile in range(tl.program_id(0), tiles_v * tiles_h, tl.num_programs(0)):
        block_v, block_h = tile_of(tile, tiles_v, tiles_h, GROUP_V)
        v0 = block_v * BLOCK_V
        h0 = block_h * BLOCK_H
        offs_v = v0.to(tl.int64) + tl.arange(0, BLOCK_V)
        offs_h = h0 + tl.arange(0, BLOCK_H)
        mask_v = offs_v < V
        mask_h = offs_h < H
        acc_weight = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
        for n0 in range(0, N, BLOCK_N):
            if USE_TMA:
                g = grad.load([n0, v0])
                x = hidden.load([n0, h0])
            else:
                offs_n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
                mask_n = offs_n < N
                # [BLOCK_N, BLOCK_V]
                g = tl.load(
                    grad + offs_n[:, None] * stride_grad_n + offs_v[None, :],
                    mask=mask_n[:, None] & mask_v[None, :],
                    other=0.0,
                )
                # [BLOCK_N, BLOCK_H]
                x = tl.load(
                    hidden + offs_n[:, None] * stride_hidden_n + offs_h[None, :],
                    mask=mask_n[:, None] & mask_h[None, :],
                    other=0.0,
                )
            if INTERPRET:
                g = g.to(tl.float32)
                x = x.to(tl.float32)
            acc_weight = tl.dot(g.T, x, acc_weight)
        tl.store(
            grad_weight_ptr + offs_v[:, None] * stride_grad_weight_v + offs_h[None, :],
            round_to(acc_weight * scale, grad_weight_ptr.dtype.element_ty),
            mask=mask_v[:, None] & mask_h[None, :],
        )


def linear_logprob_bwd_weight(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    scale: torch.Tensor,
    grad_weight: torch.Tensor,
    *,
    tile: Tile,
) -> None:
    """Write ``grad_weight [v, H]`` of one slice.

    Assumes ``grad [n, v]`` and ``hidden [n, H]`` in one half dtype with a contiguous last axis,
    ``grad_weight`` contiguous, ``scale`` one fp32 number.
    """
    n, V = grad.shape
    H = hidden.shape[1]
    tiles = cdiv(V, tile.block_v) * cdiv(H, tile.block_h)
    programs = min(tiles, program_count(grad.device) * tile.programs_per_sm)
    with device_guard(grad):
        _linear_logprob_bwd_weight_kernel[(programs,)](
            grad=operand(grad, (tile.block_n, tile.block_v), tile),
            hidden=operand(hidden, (tile.block_n, tile.block_h), tile),
            scale_ptr=scale,
            grad_weight_ptr=grad_weight,
            N=n,
            V=V,
            H=H,
            stride_grad_n=grad.stride(0),
            stride_hidden_n=hidden.stride(0),
            stride_grad_weight_v=grad_weight.stride(0),
            USE_TMA=tile.tma,
            BLOCK_N=tile.block_n,
            BLOCK_V=tile.block_v,
            BLOCK_H=tile.block_h,
            GROUP_V=tile.group_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )
