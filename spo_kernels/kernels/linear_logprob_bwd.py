"""Gradient tile of ``linear_logprob``: d loss / d z0, recomputed or read from kept exponentials.

    grad_v = (on_p p_v - g_ent p_v (log p_v + entropy) + everywhere) * slope_v
    grad_y = on_label                     the label's entry, formed outside from its log-prob

Symbols: N rows, V vocab (one slice of it), H hidden. on_p = g_lse - g_logps; slope = dz/dz0. One
program owns BLOCK_N x BLOCK_V entries; arithmetic is fp32, the tile is rounded once to the compute
dtype. fp16 upstream gradients arrive divided by a power of two per row.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.calls.layout import PART_V
from spo_kernels.kernels.device import cdiv, device_guard, program_count, round_to
from spo_kernels.kernels.logits_tile import (
    CAPPED,
    FP16_GAIN,
    LEAST_LOG_P,
    LOG2E,
    PIECE_V,
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
def _store_gradient(
    z,
    v0,
    offs_n,
    mask_n,
    label,
    logsumexp_ptr,
    entropy_ptr,
    on_p_ptr,
    on_label_ptr,
    g_entropy_ptr,
    everywhere_ptr,
    grad_ptr,
    V,
    stride_grad_n,
    tanh_scale,
    outer,
    TRANSFORM: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_EVERYWHERE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    # PLAIN: every column is inside V and no row's label is among them
    # 32-bit columns inside the piece keep the epilogue out of 64-bit arithmetic
    cols = tl.arange(0, z.shape[1])
    logsumexp = tl.load(logsumexp_ptr + offs_n, mask=mask_n, other=0.0)
    # outer is dz/dz0 without the softcap's part
    on_p = tl.load(on_p_ptr + offs_n, mask=mask_n, other=0.0) * outer
    log_p = z - logsumexp[:, None]
    grad = tl.exp2(log_p * LOG2E)
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + offs_n, mask=mask_n, other=0.0)
        g_entropy = tl.load(g_entropy_ptr + offs_n, mask=mask_n, other=0.0) * outer
        # a probability of 0 has no part in an entropy, and 0 * -inf would be NaN
        log_p = tl.maximum(log_p, LEAST_LOG_P)
        grad *= on_p[:, None] - g_entropy[:, None] * (log_p + entropy[:, None])
    else:
        grad *= on_p[:, None]
    if HAS_EVERYWHERE:
        everywhere = tl.load(everywhere_ptr + offs_n, mask=mask_n, other=0.0) * outer
        grad += everywhere[:, None]
    if TRANSFORM == CAPPED:
        tanh = z * tanh_scale
        grad *= 1.0 - tanh * tanh
    mask = mask_n[:, None]
    if not PLAIN:
        on_label = tl.load(on_label_ptr + offs_n, mask=mask_n, other=0.0)
        grad = tl.where(cols[None, :] == label[:, None], on_label[:, None], grad)
        mask = mask & (cols < padded(V) - v0)[None, :]
    tl.store(
        grad_ptr + v0 + offs_n[:, None] * stride_grad_n + cols[None, :],
        round_to(grad, grad_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit(do_not_specialize=["N", "V", "v_start"])
def _linear_logprob_bwd_logits_kernel(
    hidden,  # [N, H] pointer or descriptor
    weight,  # [V, H] pointer or descriptor: one slice of the head
    bias_ptr,  # [V]
    lora_a_ptr,  # [N, R]
    lora_b_ptr,  # [V, R]
    labels_ptr,  # [N] int64
    logsumexp_ptr,  # [N] fp32
    entropy_ptr,  # [N] fp32
    on_p_ptr,  # [N] fp32
    on_label_ptr,  # [N] fp32
    g_entropy_ptr,  # [N] fp32
    everywhere_ptr,  # [N] fp32
    grad_ptr,  # [N, V] compute dtype, out; anything up to the padded V
    N,
    V,
    H,
    R,
    v_start,
    stride_hidden_n,
    stride_weight_v,
    stride_grad_n,
    scale,
    softcap,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    TRANSFORM: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_EVERYWHERE: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
):
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
        is_plain = (tl.max(label, 0) < 0) & (v0 + BLOCK_V <= V)
        for i in tl.static_range(BLOCK_V // PIECE_V):
            first = v0 + i * PIECE_V
            z = transform(
                pieces[i], bias_ptr + first, V - first, scale, softcap, HAS_BIAS, TRANSFORM
            )
            shared = (
                z, first, offs_n, mask_n, label - i * PIECE_V, logsumexp_ptr, entropy_ptr, on_p_ptr,
                on_label_ptr, g_entropy_ptr, everywhere_ptr, grad_ptr, V, stride_grad_n,
                1.0 / softcap, outer,
            )  # fmt: skip
            # two calls, since a constexpr cannot be a value of the run
            if is_plain:
                _store_gradient(
                    *shared, TRANSFORM=TRANSFORM, HAS_ENTROPY=HAS_ENTROPY,
                    HAS_EVERYWHERE=HAS_EVERYWHERE, PLAIN=True,
                )  # fmt: skip
            else:
                _store_gradient(
                    *shared, TRANSFORM=TRANSFORM, HAS_ENTROPY=HAS_ENTROPY,
                    HAS_EVERYWHERE=HAS_EVERYWHERE, PLAIN=False,
                )  # fmt: skip


@triton.jit(do_not_specialize=["N", "V", "v_start"])
def _linear_logprob_bwd_exps_kernel(
    exps_ptr,  # [N, V] fp16|fp32: one slice of the kept exponentials
    part_max_ptr,  # [S, N] fp32: maxima of the parts, the references of exps
    labels_ptr,  # [N] int64
    logsumexp_ptr,  # [N] fp32
    entropy_ptr,  # [N] fp32
    on_p_ptr,  # [N] fp32
    on_label_ptr,  # [N] fp32
    g_entropy_ptr,  # [N] fp32
    everywhere_ptr,  # [N] fp32
    grad_ptr,  # [N, V] compute dtype, out; anything up to the padded V
    N,
    V,
    v_start,
    stride_exps_n,
    stride_grad_n,
    outer,
    HAS_ENTROPY: tl.constexpr,
    HAS_EVERYWHERE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # BLOCK_V is the forward's part, v_start a multiple of it
    tiles_v = tl.cdiv(V, BLOCK_V)
    offs_n = (tl.program_id(0) // tiles_v).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    v0 = (tl.program_id(0) % tiles_v) * BLOCK_V
    cols = tl.arange(0, BLOCK_V)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (cols < padded(V) - v0)[None, :]
    # [BLOCK_N, BLOCK_V]
    exps = tl.load(
        exps_ptr + v0 + offs_n[:, None] * stride_exps_n + cols[None, :], mask=mask, other=0.0
    )
    part = (v_start // BLOCK_V + tl.program_id(0) % tiles_v).to(tl.int64)
    part_max = tl.load(part_max_ptr + part * N + offs_n, mask=mask_n, other=0.0)
    own = tl.where(part_max == float("-inf"), 0.0, part_max)
    logsumexp = tl.load(logsumexp_ptr + offs_n, mask=mask_n, other=0.0)
    factor = tl.exp2(tl.ceil(own * LOG2E) - logsumexp * LOG2E) / FP16_GAIN
    on_p = tl.load(on_p_ptr + offs_n, mask=mask_n, other=0.0)
    on_label = tl.load(on_label_ptr + offs_n, mask=mask_n, other=0.0)
    label = local_label(labels_ptr, offs_n, mask_n, v_start + v0, BLOCK_V)
    p = exps.to(tl.float32) * factor[:, None]
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + offs_n, mask=mask_n, other=0.0)
        g_entropy = tl.load(g_entropy_ptr + offs_n, mask=mask_n, other=0.0)
        log_p = tl.log(tl.where(p == 0.0, 1.0, p))
        grad = p * (on_p[:, None] - g_entropy[:, None] * (log_p + entropy[:, None]))
    else:
        grad = p * on_p[:, None]
    if HAS_EVERYWHERE:
        grad += tl.load(everywhere_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    grad = grad * outer
    grad = tl.where(cols[None, :] == label[:, None], on_label[:, None], grad)
    tl.store(
        grad_ptr + v0 + offs_n[:, None] * stride_grad_n + cols[None, :],
        round_to(grad, grad_ptr.dtype.element_ty),
        mask=mask,
    )


def linear_logprob_bwd_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vectors: dict[str, torch.Tensor],
    grad: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    v_start: int,
    transform: Transform,
    outer: float,
    tile: Tile,
) -> None:
    """Write the gradient tile ``grad [n, v]`` of one weight slice from recomputed logits.

    Assumes what ``linear_logprob_fwd`` assumes, and fp32 row vectors logsumexp, on_p, on_label, and
    where their terms exist entropy, g_entropy, everywhere; rows of ``grad`` reach to the padded V.
    """
    n, H = hidden.shape
    V = weight.shape[0]
    tiles = cdiv(n, tile.block_n) * cdiv(V, tile.block_v)
    nothing = vectors["on_p"]
    programs = min(tiles, program_count(hidden.device) * tile.programs_per_sm)
    with device_guard(hidden):
        _linear_logprob_bwd_logits_kernel[(programs,)](
            hidden=operand(hidden, (tile.block_n, tile.block_h), tile),
            weight=operand(weight, (tile.block_v, tile.block_h), tile),
            bias_ptr=hidden if bias is None else bias,
            lora_a_ptr=hidden if lora_a is None else lora_a,
            lora_b_ptr=hidden if lora_b is None else lora_b,
            labels_ptr=labels,
            logsumexp_ptr=vectors["logsumexp"],
            entropy_ptr=vectors.get("entropy", nothing),
            on_p_ptr=vectors["on_p"],
            on_label_ptr=vectors["on_label"],
            g_entropy_ptr=vectors.get("g_entropy", nothing),
            everywhere_ptr=vectors.get("everywhere", nothing),
            grad_ptr=grad,
            N=n,
            V=V,
            H=H,
            R=0 if lora_b is None else lora_b.shape[1],
            v_start=v_start,
            stride_hidden_n=hidden.stride(0),
            stride_weight_v=weight.stride(0),
            stride_grad_n=grad.stride(0),
            scale=transform.scale,
            softcap=transform.softcap,
            outer=outer,
            HAS_BIAS=bias is not None,
            HAS_LORA=lora_b is not None,
            TRANSFORM=transform.kind,
            HAS_ENTROPY="g_entropy" in vectors,
            HAS_EVERYWHERE="everywhere" in vectors,
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
            # the entropy's terms would spill
            maxnreg=None if "g_entropy" in vectors else tile.max_registers,
        )


EXPS_BLOCK_N = 32


def linear_logprob_bwd_exps(
    exps: torch.Tensor,
    part_max: torch.Tensor,
    labels: torch.Tensor,
    vectors: dict[str, torch.Tensor],
    grad: torch.Tensor,
    *,
    v_start: int,
    outer: float,
) -> None:
    """Write the gradient tile ``grad [n, v]`` of one slice of kept exponentials.

    Assumes rows of both that reach to the padded V.
    """
    n, V = exps.shape
    nothing = vectors["on_p"]
    with device_guard(exps):
        _linear_logprob_bwd_exps_kernel[(cdiv(n, EXPS_BLOCK_N) * cdiv(V, PART_V),)](
            exps_ptr=exps,
            part_max_ptr=part_max,
            labels_ptr=labels,
            logsumexp_ptr=vectors["logsumexp"],
            entropy_ptr=vectors.get("entropy", nothing),
            on_p_ptr=vectors["on_p"],
            on_label_ptr=vectors["on_label"],
            g_entropy_ptr=vectors.get("g_entropy", nothing),
            everywhere_ptr=vectors.get("everywhere", nothing),
            grad_ptr=grad,
            N=n,
            V=V,
            v_start=v_start,
            stride_exps_n=exps.stride(0),
            stride_grad_n=grad.stride(0),
            outer=outer,
            HAS_ENTROPY="g_entropy" in vectors,
            HAS_EVERYWHERE="everywhere" in vectors,
            BLOCK_N=EXPS_BLOCK_N,
            BLOCK_V=PART_V,
            num_warps=4,
            enable_fp_fusion=True,
        )
