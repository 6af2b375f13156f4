"""Shared by the logits kernels: grid order, the logits tile, its transform and column pieces.

    z = cap((h W^T + bias + a b^T) * logit_scale) / temperature

Symbols: N rows, V vocab, H hidden, R LoRA rank. Products accumulate in fp32 and are never rounded.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spo_kernels.calls.layout import COLUMN_PAD
from spo_kernels.calls.layout import PART_V as _PART_V
from spo_kernels.kernels.device import INTERPRET, rounded_product
from spo_kernels.kernels.scalar_math import tanh
from spo_kernels.kernels.tiles import Tile

LOG2E = tl.constexpr(1.4426950408889634)
# a part this far above its row's reference keeps its own maximum as reference
REFERENCE_SLACK = tl.constexpr(60.0)
# fp16 exponentials use the head room above 1
FP16_GAIN = tl.constexpr(32768.0)

# bits of STATS
ENTROPY = tl.constexpr(1)
SQUARES = tl.constexpr(2)
MEAN = tl.constexpr(4)
TOP1 = tl.constexpr(8)
# values of TRANSFORM and WRITE_EXP
SCALED = tl.constexpr(1)
CAPPED = tl.constexpr(2)
ROW_REFERENCE = tl.constexpr(1)
OWN_REFERENCE = tl.constexpr(2)
_PAD = tl.constexpr(COLUMN_PAD)
# columns of one partial statistic, and of the pieces its epilogue is finished in
PART_V = tl.constexpr(_PART_V)
PIECE_V = tl.constexpr(32)


class Partials(NamedTuple):
    """Row statistics of a chunk of n rows before the reduction: one row of ``[S, n]`` a part."""

    max: torch.Tensor  # [S, n] fp32
    sum: torch.Tensor  # [S, n] fp32: of exponentials, without the label's
    weighted: torch.Tensor | None  # [S, n] fp32: of exponentials times logits
    squares: torch.Tensor | None  # [S, n] fp32: of squared exponentials
    plain: torch.Tensor | None  # [S, n] fp32: of logits
    target: torch.Tensor  # [n] fp32: the label's logit
    top1: torch.Tensor  # [n] int32: the part of the label, see the forward

    def pointers(self) -> dict[str, torch.Tensor]:
        """Return the arguments of a kernel; one that is switched off still needs a tensor."""
        return {
            "part_max_ptr": self.max,
            "part_sum_ptr": self.sum,
            "part_weighted_ptr": self.max if self.weighted is None else self.weighted,
            "part_squares_ptr": self.max if self.squares is None else self.squares,
            "part_plain_ptr": self.max if self.plain is None else self.plain,
            "target_ptr": self.target,
            "top1_ptr": self.top1,
        }


class Transform(NamedTuple):
    """Launch arguments of ``transform``: from raw logits to transformed ones."""

    kind: int = 0
    scale: float = 1.0
    softcap: float = 1.0


# the most negative finite number of fp32, and a log-probability whose exponential is 0
LEAST = tl.constexpr(-3.4028234663852886e38)
LEAST_LOG_P = tl.constexpr(-1000.0)


@triton.jit
def tile_of(tile, tiles_n, tiles_v, GROUP_N: tl.constexpr):
    """Map a linear tile id to (row block, vocab block); neighbours share the weight slice in L2."""
    per_group = GROUP_N * tiles_v
    first = (tile // per_group) * GROUP_N
    group = tl.minimum(tiles_n - first, GROUP_N)
    inner = tile % per_group
    return first + inner % group, inner // group


@triton.jit
def logits_tile(
    hidden,  # [N, H] pointer or descriptor
    weight,  # [V, H] pointer or descriptor
    lora_a_ptr,  # [N, R]
    lora_b_ptr,  # [V, R]
    n0,
    v0,
    N,
    V,
    H,
    R,
    stride_hidden_n,
    stride_weight_v,
    HAS_LORA: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return the fp32 accumulator ``h W^T + a b^T`` of one tile."""
    offs_n = n0.to(tl.int64) + tl.arange(0, BLOCK_N)
    offs_v = v0.to(tl.int64) + tl.arange(0, BLOCK_V)
    mask_n = offs_n < N
    mask_v = offs_v < V
    acc_logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for h0 in range(0, H, BLOCK_H):
        if USE_TMA:
            x = hidden.load([n0, h0])
            w = weight.load([v0, h0])
        else:
            offs_h = h0 + tl.arange(0, BLOCK_H)
            mask_h = offs_h < H
            # [BLOCK_N, BLOCK_H]
            x = tl.load(
                hidden + offs_n[:, None] * stride_hidden_n + offs_h[None, :],
                mask=mask_n[:, None] & mask_h[None, :],
                other=0.0,
            )
            # [BLOCK_V, BLOCK_H]
            w = tl.load(
                weight + offs_v[:, None] * stride_weight_v + offs_h[None, :],
                mask=mask_v[:, None] & mask_h[None, :],
                other=0.0,
            )
        if INTERPRET:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc_logits = tl.dot(x, w.T, acc_logits, input_precision=PRECISION)
    if HAS_LORA:
        for r0 in range(0, R, BLOCK_R):
            offs_r = r0 + tl.arange(0, BLOCK_R)
            mask_r = offs_r < R
            # [BLOCK_N, BLOCK_R]
            a = tl.load(
                lora_a_ptr + offs_n[:, None] * R + offs_r[None, :],
                mask=mask_n[:, None] & mask_r[None, :],
                other=0.0,
            )
            # [BLOCK_V, BLOCK_R]
            b = tl.load(
                lora_b_ptr + offs_v[:, None] * R + offs_r[None, :],
                mask=mask_v[:, None] & mask_r[None, :],
                other=0.0,
            )
            if INTERPRET:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc_logits = tl.dot(a, b.T, acc_logits, input_precision=PRECISION)
    return acc_logits


@triton.jit
def transform(
    z,
    bias_ptr,
    columns,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    TRANSFORM: tl.constexpr,
):
    """Return the transformed logits of a tile, whose first ``columns`` are inside the vocabulary.

    ``softcap`` is divided by the temperature; ``scale`` is logit_scale over the temperature or,
    with a softcap, over the undivided softcap.
    """
    if HAS_BIAS:
        cols = tl.arange(0, z.shape[1])
        bias = tl.load(bias_ptr + cols, mask=cols < columns, other=0.0)
        z += bias.to(tl.float32)[None, :]
    if TRANSFORM == SCALED:
        # a compiler that computes z again, in a store's layout, must not fuse it with what follows
        z = rounded_product(z, scale)
    if TRANSFORM == CAPPED:
        z = tanh(z * scale) * softcap
    return z


@triton.jit
def local_label(labels_ptr, offs_n, mask_n, first, WIDTH: tl.constexpr):
    """Return each row's label as a column of ``first : first + WIDTH``, -1 if elsewhere."""
    label = tl.load(labels_ptr + offs_n, mask=mask_n, other=-1) - first
    return tl.where((label >= 0) & (label < WIDTH), label, -1).to(tl.int32)


@triton.jit
def padded(V):
    """Return where a row of a tile buffer ends: masked there, 16 bytes are written at once."""
    return (V + _PAD - 1) // _PAD * _PAD


@triton.jit
def _halves(x):
    BLOCK_N: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_N, 2, HALF)), (0, 2, 1)))


@triton.jit
def pieces_of(x, PIECES: tl.constexpr):
    """Return the 1, 2, 4 or 8 column pieces of a tile, left to right."""
    tl.static_assert(PIECES == 1 or PIECES == 2 or PIECES == 4 or PIECES == 8)
    if PIECES == 1:
        return (x,)
    else:
        left, right = _halves(x)
        if PIECES == 2:
            return left, right
        else:
            return pieces_of(left, PIECES // 2) + pieces_of(right, PIECES // 2)


def precision_of(dtype: torch.dtype) -> str:
    """Return the fp32 product mode: torch's own TF32 switch decides, IEEE by default."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def operand(tensor: torch.Tensor, box: tuple[int, int], tile: Tile):
    """Return the operand of a tile load: a TMA descriptor of ``box`` entries, or the tensor."""
    if not tile.tma:
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box))
