"""Unpaired preference losses and their gradients on responses labelled good or bad.

    logps[s]  = sum of the tokens of response s       d[s] = logps[s] - ref_logps[s]
    loss[s]   = weight(is_desirable[s]) * loss_type(d[s], is_desirable[s], baseline; parameters)
    grads[s]  = dloss / dlogps[s]                     rewards[s] = beta * d[s]
    baseline  = z of kto, mean over M of kl_logps - ref_kl_logps, at least 0; reward shift of bco,
                the mean of the two sides' mean rewards

Symbols: S responses, N tokens in all, T tokens of a row, M responses of the KL estimate. One
program owns BLOCK_S responses and walks their tokens BLOCK_T at a time; every program computes the
baseline again, in the same order, so no program waits for another. All arithmetic is fp32. Per
token the two log-probs are subtracted before they are summed: equal models have d of exactly 0.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.calls.loss_table import UnpairedParameters
from spo_kernels.kernels.device import cdiv, device_guard
from spo_kernels.kernels.scalar_math import sigmoid_and_slope, softplus_and_sigmoid

# (BLOCK_S, BLOCK_T) where a response is one number, and where it is tokens
SUMS_BLOCKS = (128, 1)
TOKENS_BLOCKS = (1, 1024)
# values of the baseline's mean read at a time
BLOCK_M = 256
NUM_WARPS = 4

# form of ref_logps
NO_REF, REF_SUMS, REF_TOKENS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# where the baseline comes from
NO_BASELINE, GIVEN = tl.constexpr(0), tl.constexpr(1)
MEAN_KL, MEAN_REWARDS = tl.constexpr(2), tl.constexpr(3)
# of the types that have one, where it is not given
COMPUTED_BASELINE_OF = {"kto": MEAN_KL, "bco": MEAN_REWARDS}


@triton.jit
def _sums(
    logps_ptr,
    ref_logps_ptr,
    segment_offsets_ptr,
    offs_s,
    mask_s,
    N,
    T,
    stride_logps_s,
    stride_ref_logps_s,
    HAS_OFFSETS: tl.constexpr,
    REF: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """(logps, d) of the responses ``offs_s``, the tokens added up in one fixed order."""
    if HAS_OFFSETS:
        start = tl.load(segment_offsets_ptr + offs_s, mask=mask_s, other=0)
        end = tl.load(segment_offsets_ptr + offs_s + 1, mask=mask_s, other=0)
        # offsets outside the tokens must not be read
        start, end = tl.maximum(start, 0), tl.minimum(end, N)
        ref_start = start
    else:
        start, ref_start = offs_s * stride_logps_s, offs_s * stride_ref_logps_s
        end = start + T
    lengths = tl.where(mask_s, end - start, 0)

    acc_logps = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
    acc_d = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
    for first in range(0, tl.max(lengths, axis=0).to(tl.int32), BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        # [BLOCK_S, BLOCK_T]
        mask = offs_t[None, :] < lengths[:, None]
        offs = start[:, None] + offs_t[None, :]
        logps = tl.load(logps_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        acc_logps += logps
        if REF == REF_TOKENS:
            offs = ref_start[:, None] + offs_t[None, :]
            logps -= tl.load(ref_logps_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        acc_d += logps
    d = tl.sum(acc_d, axis=1)
    if REF == REF_SUMS:
        ref_offs = offs_s * stride_ref_logps_s
        d -= tl.load(ref_logps_ptr + ref_offs, mask=mask_s, other=0.0).to(tl.float32)
    return tl.sum(acc_logps, axis=1), d


@triton.jit
def _mean_kl(kl_logps_ptr, ref_kl_logps_ptr, M, BLOCK_M: tl.constexpr):
    acc = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, M, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        kl = tl.load(kl_logps_ptr + offs_m, mask=offs_m < M, other=0.0).to(tl.float32)
        acc += kl - tl.load(ref_kl_logps_ptr + offs_m, mask=offs_m < M, other=0.0).to(tl.float32)
    return tl.sum(acc, axis=0) / tl.maximum(M, 1)


@triton.jit
def _mean_rewards(
    logps_ptr,
    ref_logps_ptr,
    is_desirable_ptr,
    S,
    stride_logps_s,
    stride_ref_logps_s,
    beta,
    REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The mean over the two sides of their mean reward; a side without responses is left out."""
    sums = tl.zeros([BLOCK_M, 2], tl.float32)
    counts = tl.zeros([BLOCK_M, 2], tl.float32)
    for first in range(0, S, BLOCK_M):
        offs = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = offs < S
        d = tl.load(logps_ptr + offs * stride_logps_s, mask=mask, other=0.0).to(tl.float32)
        if REF == REF_SUMS or REF == REF_TOKENS:
            ref_offs = offs * stride_ref_logps_s
            d -= tl.load(ref_logps_ptr + ref_offs, mask=mask, other=0.0).to(tl.float32)
        side = tl.load(is_desirable_ptr + offs, mask=mask, other=0).to(tl.int32)
        is_side = (side[:, None] == tl.arange(0, 2)[None, :]) & mask[:, None]
        sums += tl.where(is_side, beta * d[:, None], 0.0)
        counts += is_side.to(tl.float32)
    counts = tl.sum(counts, axis=0)
    means = tl.sum(sums, axis=0) / tl.maximum(counts, 1.0)
    sides = tl.sum((counts > 0.0).to(tl.float32), axis=0)
    return tl.sum(means, axis=0) / tl.maximum(sides, 1.0)


# each returns (loss, slope, z, shift): the slope of -sign beta d, and the two baselines it used


@triton.jit
def kto(d, sign, baseline, beta):
    # a NaN stays one
    z = tl.where(baseline < 0.0, 0.0, baseline)
    loss, slope = sigmoid_and_slope(-sign * (beta * (d - z)))
    return loss, slope, z, 0.0


@triton.jit
def apo_zero_unpaired(d, sign, baseline, beta):
    loss, slope = sigmoid_and_slope(-sign * (beta * d))
    return loss, slope, 0.0, 0.0


@triton.jit
def bco(d, sign, baseline, beta):
    loss, slope = softplus_and_sigmoid(sign * (baseline - beta * d))
    return loss, slope, 0.0, baseline


LOSS_OF = {
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco,
}


@triton.jit
def _unpaired_preference_loss_fwd_kernel(
    logps_ptr,  # [S, T], or [N] with offsets
    ref_logps_ptr,  # like logps, or [S]; read if REF
    is_desirable_ptr,  # [S] bool
    segment_offsets_ptr,  # [S + 1] int64, read if HAS_OFFSETS
    kl_logps_ptr,  # [M], read for a computed baseline of kto
    ref_kl_logps_ptr,  # [M], read for a computed baseline of kto
    baseline_ptr,  # [], read if the baseline is given
    losses_ptr,  # [S] fp32, out
    grads_ptr,  # [S] fp32, out: dloss / dlogps
    rewards_ptr,  # [S] fp32, out
    sums_ptr,  # [S] fp32, out
    baselines_ptr,  # [2] fp32, out: z of kto, reward shift of bco
    S,
    N,
    T,
    M,
    stride_logps_s,
    stride_ref_logps_s,
    parameters,  # UnpairedParameters of fp32
    HAS_OFFSETS: tl.constexpr,
    REF: tl.constexpr,
    BASELINE: tl.constexpr,
    LOSS: tl.constexpr,  # jit function of the loss type
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    # [BLOCK_S]
    sums, d = _sums(
        logps_ptr=logps_ptr,
        ref_logps_ptr=ref_logps_ptr,
        segment_offsets_ptr=segment_offsets_ptr,
        offs_s=offs_s,
        mask_s=mask_s,
        N=N,
        T=T,
        stride_logps_s=stride_logps_s,
        stride_ref_logps_s=stride_ref_logps_s,
        HAS_OFFSETS=HAS_OFFSETS,
        REF=REF,
        BLOCK_S=BLOCK_S,
        BLOCK_T=BLOCK_T,
    )
    reward = parameters.beta * d
    is_desirable = tl.load(is_desirable_ptr + offs_s, mask=mask_s, other=0) != 0
    sign = tl.where(is_desirable, 1.0, -1.0)

    if BASELINE == GIVEN:
        baseline = tl.load(baseline_ptr).to(tl.float32)
    elif BASELINE == MEAN_KL:
        baseline = _mean_kl(kl_logps_ptr, ref_kl_logps_ptr, M, BLOCK_M)
    elif BASELINE == MEAN_REWARDS:
        baseline = _mean_rewards(
            logps_ptr=logps_ptr,
            ref_logps_ptr=ref_logps_ptr,
            is_desirable_ptr=is_desirable_ptr,
            S=S,
            stride_logps_s=stride_logps_s,
            stride_ref_logps_s=stride_ref_logps_s,
            beta=parameters.beta,
            REF=REF,
            BLOCK_M=BLOCK_M,
        )
    else:
        baseline = 0.0

    loss, slope, z, shift = LOSS(d, sign, baseline, parameters.beta)
    grad = -parameters.beta * sign * slope
    weight = tl.where(is_desirable, parameters.desirable_weight, parameters.undesirable_weight)

    tl.store(losses_ptr + offs_s, weight * loss, mask=mask_s)
    tl.store(grads_ptr + offs_s, weight * grad, mask=mask_s)
    tl.store(rewards_ptr + offs_s, reward, mask=mask_s)
    tl.store(sums_ptr + offs_s, sums, mask=mask_s)
    if tl.program_id(0) == 0:
        tl.store(baselines_ptr, z)
        tl.store(baselines_ptr + 1, shift)


@triton.jit
def _unpaired_preference_loss_fwd_sums_kernel(
    logps_ptr,  # [S, T], or [N] with offsets
    ref_logps_ptr,  # like logps, or [S]; read if REF
    segment_offsets_ptr,  # [S + 1] int64, read if HAS_OFFSETS
    sums_ptr,  # [2, S] fp32, out: logps, d
    S,
    N,
    T,
    stride_logps_s,
    stride_ref_logps_s,
    HAS_OFFSETS: tl.constexpr,
    REF: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    sums, d = _sums(
        logps_ptr=logps_ptr,
        ref_logps_ptr=ref_logps_ptr,
        segment_offsets_ptr=segment_offsets_ptr,
        offs_s=offs_s,
        mask_s=mask_s,
        N=N,
        T=T,
        stride_logps_s=stride_logps_s,
        stride_ref_logps_s=stride_ref_logps_s,
        HAS_OFFSETS=HAS_OFFSETS,
        REF=REF,
        BLOCK_S=BLOCK_S,
        BLOCK_T=BLOCK_T,
    )
    tl.store(sums_ptr + offs_s, sums, mask=mask_s)
    tl.store(sums_ptr + S + offs_s, d, mask=mask_s)


def unpaired_preference_loss_fwd(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    is_desirable: torch.Tensor,
    segment_offsets: torch.Tensor | None,
    kl_logps: torch.Tensor | None,
    ref_kl_logps: torch.Tensor | None,
    baseline: torch.Tensor | None,
    *,
    ref_has_tokens: bool,
    loss_type: str,
    parameters: UnpairedParameters,
) -> tuple[torch.Tensor, ...]:
    """Return (losses [S], grads [S], rewards [S], sums [S], baselines [2]).

    Inputs are checked; strides are free. One launch, or two where bco has to compute its reward
    shift from token log-probs, which needs every sum first.
    """
    S = is_desirable.numel()
    has_offsets = segment_offsets is not None
    logps, T, stride_logps_s = _rows(logps, has_offsets)
    has_tokens = has_offsets or T != 1
    ref, stride_ref_logps_s = NO_REF, 0
    if ref_logps is not None:
        ref = REF_TOKENS if ref_has_tokens else REF_SUMS
        ref_logps, _, stride_ref_logps_s = _rows(ref_logps, has_offsets and ref_has_tokens)
    is_desirable = is_desirable.contiguous()
    block_s, block_t = TOKENS_BLOCKS if has_tokens else SUMS_BLOCKS
    if baseline is not None:
        source = GIVEN
    else:
        source = COMPUTED_BASELINE_OF.get(loss_type, NO_BASELINE)

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float32, device=logps.device)

    losses, grads, rewards, sums, baselines = empty(S), empty(S), empty(S), empty(S), empty(2)
    with device_guard(logps):
        token_sums = None
        if source is MEAN_REWARDS and has_tokens and S > 0:
            token_sums = empty(2, S)
            _unpaired_preference_loss_fwd_sums_kernel[(cdiv(S, block_s),)](
                logps_ptr=logps,
                ref_logps_ptr=ref_logps,
                segment_offsets_ptr=segment_offsets.contiguous() if has_offsets else None,
                sums_ptr=token_sums,
                S=S,
                N=logps.numel(),
                T=T,
                stride_logps_s=stride_logps_s,
                stride_ref_logps_s=stride_ref_logps_s,
                HAS_OFFSETS=has_offsets,
                REF=ref,
                BLOCK_S=block_s,
                BLOCK_T=block_t,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
            # from here on a response is its d
            logps, T, stride_logps_s, ref, ref_logps = token_sums[1], 1, 1, NO_REF, None
            has_offsets, segment_offsets = False, None
            block_s, block_t = SUMS_BLOCKS
        # a program without responses still writes the baseline
        _unpaired_preference_loss_fwd_kernel[(max(cdiv(S, block_s), 1),)](
            logps_ptr=logps,
            ref_logps_ptr=ref_logps,
            is_desirable_ptr=is_desirable,
            segment_offsets_ptr=segment_offsets.contiguous() if has_offsets else None,
            kl_logps_ptr=None if kl_logps is None else kl_logps.contiguous(),
            ref_kl_logps_ptr=None if ref_kl_logps is None else ref_kl_logps.contiguous(),
            baseline_ptr=baseline,
            losses_ptr=losses,
            grads_ptr=grads,
            rewards_ptr=rewards,
            sums_ptr=sums,
            baselines_ptr=baselines,
            S=S,
            N=logps.numel(),
            T=T,
            M=0 if kl_logps is None else kl_logps.numel(),
            stride_logps_s=stride_logps_s,
            stride_ref_logps_s=stride_ref_logps_s,
            parameters=parameters,
            HAS_OFFSETS=has_offsets,
            REF=ref,
            BASELINE=source,
            LOSS=LOSS_OF[loss_type],
            BLOCK_S=block_s,
            BLOCK_T=block_t,
            BLOCK_M=BLOCK_M,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return losses, grads, rewards, sums if token_sums is None else token_sums[0], baselines


def _rows(tensor: torch.Tensor, is_flat: bool) -> tuple[torch.Tensor, int, int]:
    """Return the tensor to read, the tokens of a row and the step from row to row."""
    if is_flat:
        return tensor.contiguous(), 0, 0
    if tensor.dim() == 1:
        return tensor, 1, tensor.stride(0)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.shape[1], tensor.stride(0)
