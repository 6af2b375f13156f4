"""Sums over the tokens of each pair's responses, and the gradients that go back to them.

A response is a sum, a row of tokens, or the tokens between two offsets. One program owns BLOCK_P
pairs and walks their tokens BLOCK_T at a time. Sums over tokens are fp64 until the reference's is
subtracted, so that a score is rounded once however long the response; addresses are int64.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from spo_kernels.calls.preference_loss import Form, Side

# sums: many pairs a program; tokens: one pair, its tokens side by side
SUMS_BLOCK_P = 128
TOKENS_BLOCK_T = 512
# a batch type's program owns all pairs, on a tile of this many tokens
BATCH_TILE = 1024
NUM_WARPS = 4
# all a thread may have: left alone, ptxas spills a few to raise an occupancy that programs this few
# and this short have no use for
MAX_REGISTERS = 255
# vectors of each response that a batch type's program writes and reads back
SCRATCH_ROWS = tl.constexpr(6)


class SidePointers(NamedTuple):
    """One response of every pair; a tensor is given as ``_tokens`` or as ``_sums``, or as None."""

    tokens: Any
    sums: Any
    ref_tokens: Any
    ref_sums: Any
    square_tokens: Any
    square_sums: Any
    mask: Any
    offsets: Any
    lengths: Any
    row_tokens: Any  # tokens a response without offsets
    all_tokens: Any


@triton.jit
def bounds(side, offs_p, mask_p):
    # first and past-the-last flat token of each pair, [BLOCK_P] int64
    if side.offsets is not None:
        start = tl.load(side.offsets + offs_p, mask=mask_p, other=0)
        end = tl.load(side.offsets + offs_p + 1, mask=mask_p, other=0)
        # offsets are not read back to be checked: no address may lie outside
        start = tl.minimum(tl.maximum(start, 0), side.all_tokens)
        end = tl.minimum(tl.maximum(end, start), side.all_tokens)
    else:
        start = offs_p * side.row_tokens
        end = tl.where(mask_p, start + side.row_tokens, start)
    return start, end


@triton.jit
def _counts_of(mask_ptr, offs, inside):
    return tl.load(mask_ptr + offs, mask=inside, other=0) != 0


@triton.jit
def _token_sum(ptr, mask_ptr, start, end, tail, tail_weight, BLOCK_T: tl.constexpr):
    # [BLOCK_P] fp64; tail is the first token that weighs tail_weight
    acc = tl.zeros([start.shape[0], BLOCK_T], tl.float64)
    for t in range(0, tl.max(end - start, axis=0), BLOCK_T):
        offs = start[:, None] + t + tl.arange(0, BLOCK_T)[None, :]
        inside = offs < end[:, None]
        if mask_ptr is not None:
            inside = inside & _counts_of(mask_ptr, offs, inside)
        value = tl.load(ptr + offs, mask=inside, other=0.0).to(tl.float64)
        if tail is not None:
            value = tl.where(offs >= tail[:, None], tail_weight * value, value)
        acc += value
    return tl.sum(acc, axis=1)


# no early return: code after one under a constexpr condition is compiled all the same
@triton.jit
def token_count(mask_ptr, start, end, BLOCK_T: tl.constexpr):
    count = end - start
    if mask_ptr is not None:
        acc = tl.zeros([start.shape[0], BLOCK_T], tl.int64)
        for t in range(0, tl.max(end - start, axis=0), BLOCK_T):
            offs = start[:, None] + t + tl.arange(0, BLOCK_T)[None, :]
            acc += _counts_of(mask_ptr, offs, offs < end[:, None]).to(tl.int64)
        count = tl.sum(acc, axis=1)
    return count


@triton.jit
def tail_of(mask_ptr, start, end, shared, BLOCK_T: tl.constexpr):
    # the first flat token after the first `shared` ones that count
    if mask_ptr is None:
        tail = start + shared
    else:
        running = tl.zeros_like(shared)
        # where the BLOCK_T tokens start that hold it, and how many tokens count before
        base, base_count = start, running
        for t in range(0, tl.max(end - start, axis=0), BLOCK_T):
            offs = start[:, None] + t + tl.arange(0, BLOCK_T)[None, :]
            counted = _counts_of(mask_ptr, offs, offs < end[:, None])
            running += tl.sum(counted.to(tl.int32), axis=1)
            is_within = running <= shared
            base = tl.where(is_within, start + (t + BLOCK_T), base)
            base_count = tl.where(is_within, running, base_count)
        lanes = tl.arange(0, BLOCK_T)[None, :]
        offs = base[:, None] + lanes
        counted = _counts_of(mask_ptr, offs, offs < end[:, None]).to(tl.int32)
        # the most lanes that stay within the shared length, bit by bit: a scan would spill
        k = tl.zeros_like(shared)
        bit = BLOCK_T
        while bit > 0:
            wider = k + bit
            count = tl.sum(tl.where(lanes < wider[:, None], counted, 0), axis=1)
            k = tl.where((wider <= BLOCK_T) & (base_count + count <= shared), wider, k)
            bit = bit // 2
        tail = base + k
    return tl.minimum(tail, end)


@triton.jit
def _sum_of(tokens, sums, mask_ptr, start, end, tail, alpha, offs_p, mask_p, BLOCK_T: tl.constexpr):
    if tokens is not None:
        value = _token_sum(tokens, mask_ptr, start, end, tail, alpha, BLOCK_T)
    else:
        value = tl.load(sums + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    return value


@triton.jit
def read_side(
    side, start, end, tail, ld_alpha, scratch_ptr, P, offs_p, mask_p, BLOCK_T: tl.constexpr
):
    """Return (score, policy, reference, policy without tail weights, length, policy - square)."""
    plain = _sum_of(
        tokens=side.tokens,
        sums=side.sums,
        mask_ptr=side.mask,
        start=start,
        end=end,
        tail=None,
        alpha=1.0,
        offs_p=offs_p,
        mask_p=mask_p,
        BLOCK_T=BLOCK_T,
    )
    policy = plain
    if tail is not None:
        policy = _token_sum(side.tokens, side.mask, start, end, tail, ld_alpha, BLOCK_T)
    ref = tl.zeros_like(plain)
    if side.ref_tokens is not None or side.ref_sums is not None:
        ref = _sum_of(
            tokens=side.ref_tokens,
            sums=side.ref_sums,
            mask_ptr=side.mask,
            start=start,
            end=end,
            tail=tail,
            alpha=ld_alpha,
            offs_p=offs_p,
            mask_p=mask_p,
            BLOCK_T=BLOCK_T,
        )
    score = (policy - ref).to(tl.float32)
    aligned = plain
    if side.square_tokens is not None or side.square_sums is not None:
        aligned = plain - _sum_of(
            tokens=side.square_tokens,
            sums=side.square_sums,
            mask_ptr=side.mask,
            start=start,
            end=end,
            tail=None,
            alpha=1.0,
            offs_p=offs_p,
            mask_p=mask_p,
            BLOCK_T=BLOCK_T,
        )
    policy, ref = policy.to(tl.float32), ref.to(tl.float32)
    plain, aligned = plain.to(tl.float32), aligned.to(tl.float32)
    length = tl.zeros_like(plain)
    if side.lengths is not None:
        length = tl.load(side.lengths + offs_p, mask=mask_p, other=0).to(tl.float32)
    elif side.mask is not None:
        length = token_count(side.mask, start, end, BLOCK_T).to(tl.float32)
    if scratch_ptr is not None:
        # a row sum lies where its tile lay, each value in many threads: a store and a load lay it
        # out like any vector, which the terms need to fit into the registers
        at = scratch_ptr + offs_p
        tl.store(at, policy, mask=mask_p)
        tl.store(at + P, ref, mask=mask_p)
        tl.store(at + 2 * P, plain, mask=mask_p)
        tl.store(at + 3 * P, length, mask=mask_p)
        tl.store(at + 4 * P, aligned, mask=mask_p)
        tl.store(at + 5 * P, score, mask=mask_p)
        tl.debug_barrier()
        policy = tl.load(at, mask=mask_p, other=0.0)
        ref = tl.load(at + P, mask=mask_p, other=0.0)
        plain = tl.load(at + 2 * P, mask=mask_p, other=0.0)
        length = tl.load(at + 3 * P, mask=mask_p, other=0.0)
        aligned = tl.load(at + 4 * P, mask=mask_p, other=0.0)
        score = tl.load(at + 5 * P, mask=mask_p, other=0.0)
    return score, policy, ref, plain, length, aligned


@triton.jit
def _write_tokens(out_ptr, mask_ptr, start, end, head, tail, beyond, BLOCK_T: tl.constexpr):
    # `head` at the tokens of [start, end) that count, `beyond` from tail on, 0 at the others
    for t in range(0, tl.max(end - start, axis=0), BLOCK_T):
        offs = start[:, None] + t + tl.arange(0, BLOCK_T)[None, :]
        inside = offs < end[:, None]
        value = tl.zeros(offs.shape, tl.float32) + head[:, None]
        if tail is not None:
            value = tl.where(offs >= tail[:, None], beyond[:, None], value)
        if mask_ptr is not None:
            value = tl.where(_counts_of(mask_ptr, offs, inside), value, 0.0)
        tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def write_side(side, out_ptr, score, plain, tails_ptr, ld_alpha, P, offs_p, mask_p, BLOCK_T):
    # the gradient of one response's log-probs, in the form they were given
    if side.tokens is None:
        grad = (score + plain).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_p, grad, mask=mask_p)
    else:
        start, end = bounds(side, offs_p, mask_p)
        tail = None
        if tails_ptr is not None:
            tail = tl.load(tails_ptr + offs_p, mask=mask_p, other=0)
        head, beyond = score + plain, ld_alpha * score + plain
        _write_tokens(out_ptr, side.mask, start, end, head, tail, beyond, BLOCK_T)
        if side.offsets is not None:
            # the tokens before the first response and after the last one
            first = offs_p == 0
            begin = tl.where(first & mask_p, start, 0)
            zero = tl.zeros_like(score)
            no_start = tl.zeros_like(start)
            _write_tokens(out_ptr, None, no_start, begin, zero, None, zero, BLOCK_T)
            is_last = (offs_p == P - 1) & mask_p
            stop = tl.where(is_last, side.all_tokens, end)
            _write_tokens(out_ptr, None, end, stop, zero, None, zero, BLOCK_T)


def launch_shape(P: int, has_tokens: bool, is_batch: bool) -> tuple[int, int, int]:
    """Return (BLOCK_P, BLOCK_T, num_warps) of a launch."""
    if is_batch:
        block_p = max(16, triton.next_power_of_2(P))
        block_t = max(1, BATCH_TILE // block_p) if has_tokens else 1
        return block_p, block_t, 2 * NUM_WARPS
    if has_tokens:
        return 1, TOKENS_BLOCK_T, NUM_WARPS
    return SUMS_BLOCK_P, SUMS_BLOCK_P, NUM_WARPS


def pointers_of(side: Side) -> SidePointers:
    def split(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if tensor is None:
            return None, None
        tensor = tensor.contiguous()
        return (tensor, None) if tensor.dim() == 2 else (None, tensor)

    tokens, sums = split(side.logps)
    ref_tokens, ref_sums = split(side.ref)
    square_tokens, square_sums = split(side.log_sum_sq)
    return form_pointers_of(side.form)._replace(
        tokens=tokens,
        sums=sums,
        ref_tokens=ref_tokens,
        ref_sums=ref_sums,
        square_tokens=square_tokens,
        square_sums=square_sums,
        lengths=contiguous(side.lengths),
    )


def form_pointers_of(form: Form) -> SidePointers:
    """Return where the tokens are; ``tokens`` is anything but None where there are any."""
    mask = contiguous(form.mask)
    return SidePointers(
        tokens=1 if form.has_tokens else None,
        sums=None,
        ref_tokens=None,
        ref_sums=None,
        square_tokens=None,
        square_sums=None,
        mask=mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask,
        offsets=contiguous(form.offsets),
        lengths=None,
        row_tokens=form.shape[1] if form.has_tokens else 1,
        all_tokens=form.shape.numel(),
    )


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
