"""The cases compiled ahead of time: every kernel with its tiles, switches and argument types.

Tiles come from the same table and switches from the same constants as those of a launch.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import triton

from spo_kernels.calls.layout import PART_V
from spo_kernels.calls.loss_table import (
    LISTWISE_LOSS_TYPES,
    LOSS_TYPES,
    MAX_BATCH_PAIRS,
    UNPAIRED_LOSS_TYPES,
    ListwiseParameters,
    Parameters,
    UnpairedParameters,
)
from spo_kernels.kernels import (
    bradley_terry_loss,
    degree_loss,
    degree_loss_bwd,
    linear_logprob_bwd,
    linear_logprob_bwd_weight,
    linear_logprob_fwd,
    linear_logprob_rows,
    listwise_preference_loss,
    logits_tile,
    preference_loss,
    preference_loss_bwd,
    unpaired_preference_loss,
    unpaired_preference_loss_bwd,
)
from spo_kernels.kernels.pair_tokens import MAX_REGISTERS, SidePointers, launch_shape
from spo_kernels.kernels.tiles import Tile

ARCHS = ("sm_80", "sm_90", "sm_100")
# shared memory one block may use
SHARED_LIMIT_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
SMALL_SHARED_LIMIT_BYTES = 99 << 10

_DPO_STATS = sum(bit.value for bit in (logits_tile.ENTROPY, logits_tile.MEAN, logits_tile.TOP1))
_ALL_STATS = _DPO_STATS | logits_tile.SQUARES.value
_FWD_SWITCHES = {
    "logps": {"STATS": 0, "WRITE_EXP": 0, "TRANSFORM": 0, "HAS_BIAS": False, "HAS_LORA": False},
    "dpo+exps": {
        "STATS": _DPO_STATS,
        "WRITE_EXP": logits_tile.ROW_REFERENCE.value,
        "TRANSFORM": 0,
        "HAS_BIAS": False,
        "HAS_LORA": False,
    },
    "dpo+exps scaled": {
        "STATS": _DPO_STATS,
        "WRITE_EXP": logits_tile.ROW_REFERENCE.value,
        "TRANSFORM": logits_tile.SCALED.value,
        "HAS_BIAS": False,
        "HAS_LORA": False,
    },
    "everything": {
        "STATS": _ALL_STATS,
        "WRITE_EXP": logits_tile.OWN_REFERENCE.value,
        "TRANSFORM": logits_tile.CAPPED.value,
        "HAS_BIAS": True,
        "HAS_LORA": True,
    },
}
_BWD_SWITCHES = {
    "plain": {"TRANSFORM": 0, "HAS_ENTROPY": False, "HAS_EVERYWHERE": False},
    "capped": {
        "TRANSFORM": logits_tile.CAPPED.value,
        "HAS_ENTROPY": False,
        "HAS_EVERYWHERE": False,
    },
    "entropy": {"TRANSFORM": 0, "HAS_ENTROPY": True, "HAS_EVERYWHERE": True},
}
_TILED = {
    "fwd": (linear_logprob_fwd._linear_logprob_fwd_kernel, _FWD_SWITCHES),
    "bwd": (linear_logprob_bwd._linear_logprob_bwd_logits_kernel, _BWD_SWITCHES),
    "weight": (linear_logprob_bwd_weight._linear_logprob_bwd_weight_kernel, {"plain": {}}),
}
_POINTERS = {
    "labels_ptr": "*i64",
    "segment_offsets_ptr": "*i64",
    "block_segments_ptr": "*i64",
    "levels_ptr": "*i8",
    "is_top1_ptr": "*i1",
    "view_mask_ptr": "*i1",
    "top1_ptr": "*i32",
    "is_correct_ptr": "*i1",
    "mask_ptr": "*i1",
    "counted_ptr": "*i1",
    "is_desirable_ptr": "*i1",
    "tails_ptr": "*i64",
    "ranks_ptr": "*i32",
    "correct_views_ptr": "*i32",
    "counted_views_ptr": "*i32",
}
_COMPUTE_DTYPE = {
    "exps_ptr",
    "grad_ptr",
    "bias_ptr",
    "lora_a_ptr",
    "lora_b_ptr",
    "head_ptr",
    "hidden_ptr",
    "grad_hidden_ptr",
    "grad_weight_ptr",
}
_FLOATS = {"scale", "softcap", "outer", "slope", "ld_alpha", "divergence_power", "center"}

_SIZES = {"row_tokens": "i32", "all_tokens": "i32"}
_SUMS_SIDE = SidePointers(
    tokens="constexpr",
    sums="*fp32",
    ref_tokens="constexpr",
    ref_sums="*fp32",
    square_tokens="constexpr",
    square_sums="*fp32",
    mask="constexpr",
    offsets="constexpr",
    lengths="*i64",
    **_SIZES,
)
_TOKENS_SIDE = SidePointers(
    tokens="*fp32",
    sums="constexpr",
    ref_tokens="*fp32",
    ref_sums="constexpr",
    square_tokens="*fp32",
    square_sums="constexpr",
    mask="*u8",
    offsets="*i64",
    lengths="constexpr",
    **_SIZES,
)


@dataclasses.dataclass(frozen=True)
class Case:
    kernel: Any
    arch: str
    tile: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    shared_limit_bytes: int
    fp_fusion: bool = True
    max_registers: int | None = None
    unaligned: bool = False


def cases(
    archs: tuple[str, ...], tiles: Mapping[tuple[str, str, str, str], Tile]
) -> Iterator[Case]:
    for (kind, arch_class, dtype_class, loads), tile in tiles.items():
        arch = "sm_80" if arch_class == "small" else arch_class
        if arch not in archs:
            continue
        limit = SMALL_SHARED_LIMIT_BYTES if arch_class == "small" else SHARED_LIMIT_BYTES[arch]
        dtype = "fp32" if dtype_class == "float" else "bf16"
        kernel, switches = _TILED[kind]
        for name, on in switches.items():
            constexprs = {
                "HAS_BIAS": False,
                "HAS_LORA": False,
                **on,
                "PRECISION": "ieee",
                "USE_TMA": tile.tma,
                "BLOCK_N": tile.block_n,
                "BLOCK_V": tile.block_v,
                "BLOCK_H": tile.block_h,
                "BLOCK_R": tile.block_r,
                "GROUP_N": tile.group_n,
                "GROUP_V": tile.group_n,
            }
            constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
            shape = f"{tile.block_n}x{tile.block_v}x{tile.block_h}"
            yield Case(
                kernel=kernel,
                arch=arch,
                tile=f"{shape} {arch_class} {dtype} {loads} {name}",
                signature=_signature(kernel, constexprs, dtype, tile),
                constexprs=constexprs,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                shared_limit_bytes=limit,
                max_registers=None if on.get("HAS_ENTROPY") else tile.max_registers,
                unaligned=loads == "pointer" and (kind, arch_class, dtype_class, "tma") in tiles,
            )
    for arch in archs:
        for kernel, label, constexprs, num_stages in _small_kernels():
            yield Case(
                kernel=kernel,
                arch=arch,
                tile=label,
                signature=_signature(kernel, constexprs, label.split()[0], None),
                constexprs=constexprs,
                num_warps=4,
                num_stages=num_stages,
                shared_limit_bytes=SHARED_LIMIT_BYTES[arch],
            )
        yield from _preference_cases(arch)
        yield from _list_cases(arch)


def _small_kernels() -> Iterator[tuple[Any, str, dict[str, Any], int]]:
    """Yield (kernel, dtype and variant, constexprs, stages) of the kernels without a tile row."""
    rows = linear_logprob_rows
    for mode in (logits_tile.ROW_REFERENCE.value, logits_tile.OWN_REFERENCE.value):
        blocks = {"BLOCK_S": rows.REDUCE_BLOCK_S, "BLOCK_N": rows.REDUCE_BLOCK_N}
        switches = {"STATS": _ALL_STATS, "WRITE_EXP": mode}
        yield rows._linear_logprob_reduce_kernel, f"fp32 mode {mode}", {**switches, **blocks}, 3
        blocks = {"BLOCK_N": rows.RESCALE_BLOCK_N, "BLOCK_V": PART_V}
        blocks["SPLITS"] = rows.RESCALE_SPLITS
        yield (
            rows._linear_logprob_rescale_kernel,
            f"bf16 mode {mode}",
            {**blocks, "WRITE_EXP": mode},
            3,
        )
    direction = {
        "COMPUTE_DTYPE": triton.language.bfloat16,
        "SCALE_ROWS": True,
        "BLOCK_H": rows.DIRECTION_BLOCK_H,
    }
    yield rows._linear_logprob_direction_kernel, "bf16", direction, 3
    for entropy in (False, True):
        blocks = {"BLOCK_N": linear_logprob_bwd.EXPS_BLOCK_N, "BLOCK_V": PART_V}
        switches = {"HAS_ENTROPY": entropy, "HAS_EVERYWHERE": entropy}
        kernel = linear_logprob_bwd._linear_logprob_bwd_exps_kernel
        yield kernel, f"bf16 entropy {entropy}", {**switches, **blocks}, 3

    blocks = {"BLOCK_H": degree_loss.BLOCK_H, "BLOCK_K": degree_loss.BLOCK_K}
    constexprs = {"BLOCK_B": degree_loss.BLOCK_B, "BLOCK_S": degree_loss.BLOCK_S}
    yield degree_loss._degree_loss_fwd_blocks_kernel, "fp32", constexprs, 3
    for dtype in ("bf16", "fp32"):
        constexprs = {**blocks, "BLOCK_N": degree_loss.BLOCK_N}
        constexprs["BLOCK_H"] = degree_loss.SUMS_BLOCK_H
        yield degree_loss._degree_loss_fwd_sums_kernel, dtype, constexprs, degree_loss.NUM_STAGES
    for center in (False, True):
        constexprs = {**blocks, "CENTER": center}
        yield degree_loss._degree_loss_fwd_pool_kernel, f"fp32 center {center}", constexprs, 3
        constexprs = {**constexprs, "HAS_BIAS": True}
        yield degree_loss._degree_loss_fwd_views_kernel, f"fp32 center {center}", constexprs, 3
    constexprs = {
        "BLOCK_N": degree_loss_bwd.BLOCK_N,
        "BLOCK_H": degree_loss_bwd.BLOCK_H,
        "BLOCK_S": degree_loss_bwd.BLOCK_S,
    }
    yield degree_loss_bwd._degree_loss_bwd_hidden_kernel, "bf16", constexprs, 3
    constexprs = {"BLOCK_M": degree_loss_bwd.BLOCK_M}
    yield degree_loss_bwd._degree_loss_bwd_head_kernel, "fp32", constexprs, 3


def _preference_cases(arch: str) -> Iterator[Case]:
    """Yield launches of ``preference_loss``: all loss types at once, and each alone.

    Every input takes part, but for "no extras".
    """
    fwd = preference_loss._preference_loss_fwd_kernel
    bwd = preference_loss_bwd._preference_loss_bwd_kernel
    own = tuple(row for row in LOSS_TYPES if not row.batch)
    mixes = [("no extras", own[:1], 16), ("own", own, 16)]
    mixes += [("every", LOSS_TYPES, pairs) for pairs in (16, MAX_BATCH_PAIRS)]
    for row in LOSS_TYPES:
        mixes += [(row.name, (row,), pairs) for pairs in (16, MAX_BATCH_PAIRS)[: 1 + row.batch]]
    for name, rows, pairs in mixes:
        # the backward of a type that couples no pairs is that of "own"
        is_coupled = any(row.couples_pairs for row in rows)
        kernels = (fwd, bwd) if is_coupled or len(rows) > 1 or name == "no extras" else (fwd,)
        for has_tokens in (False, True):
            for kernel in kernels:
                is_batch = kernel is fwd and any(row.batch for row in rows)
                block_p, block_t, num_warps = launch_shape(pairs, has_tokens, is_batch)
                constexprs = {"BLOCK_P": block_p, "BLOCK_T": block_t}
                constexprs["KINDS"] = tuple(row.kind for row in rows)
                if kernel is fwd:
                    constexprs |= {"DIVERGENCE": 1, "HAS_RESPONSE": name != "no extras"}
                if not has_tokens:
                    constexprs["tails_ptr"] = None
                if not (has_tokens and is_batch):
                    constexprs["scratch_ptr"] = None
                if name == "no extras":
                    absent = ("response", "pair_weights_ptr", "grad_response_ptr")
                    constexprs |= dict.fromkeys(absent)
                constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
                side = _TOKENS_SIDE if has_tokens else _SUMS_SIDE
                if name == "no extras":
                    side = side._replace(mask="constexpr", offsets="constexpr")
                signature = _signature(kernel, constexprs, "fp32", None, side)
                for place, argument in enumerate(signature.values()):
                    if argument is side:
                        absent = (k for k, kind in enumerate(side) if kind == "constexpr")
                        constexprs |= {(place, k): None for k in absent}
                if kernel is fwd:
                    place = kernel.arg_names.index("terms")
                    terms = (preference_loss.TERM_OF[row.name] for row in rows)
                    constexprs |= {(place, k): term for k, term in enumerate(terms)}
                yield Case(
                    kernel=kernel,
                    arch=arch,
                    tile=f"fp32 {pairs} pairs, {'tokens' if has_tokens else 'sums'} {name}",
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=num_warps,
                    num_stages=3,
                    shared_limit_bytes=SHARED_LIMIT_BYTES[arch],
                    # softplus needs its compensated sums as written
                    fp_fusion=False,
                    max_registers=MAX_REGISTERS if kernel is fwd else None,
                )


def _list_cases(arch: str) -> Iterator[Case]:
    """Yield the launches of the Bradley-Terry, unpaired and listwise losses, one a loss type."""
    found = []
    kernel = bradley_terry_loss._bradley_terry_loss_fwd_kernel
    for on in (False, True):
        blocks_of = {"BLOCK_P": bradley_terry_loss.BLOCK_P}
        found.append(
            (kernel, f"extras {on}", {"HAS_MARGINS": on, "HAS_CENTER": on, **blocks_of}, 4)
        )
    kernel = listwise_preference_loss._listwise_preference_loss_fwd_kernel
    for row in LISTWISE_LOSS_TYPES:
        for block_k, num_warps in listwise_preference_loss.NUM_WARPS.items():
            constexprs = {"HAS_REF": True, "HAS_MASK": True, "BLOCK_K": block_k}
            constexprs["LOSS"] = listwise_preference_loss.LOSS_OF[row.name]
            found.append((kernel, f"{row.name} K {block_k}", constexprs, num_warps))
    unpaired = unpaired_preference_loss
    for row in UNPAIRED_LOSS_TYPES:
        for has_offsets in (False, True):
            size = unpaired.TOKENS_BLOCKS if has_offsets else unpaired.SUMS_BLOCKS
            constexprs = {"HAS_OFFSETS": has_offsets, "REF": 1 + has_offsets}
            constexprs |= {"LOSS": unpaired.LOSS_OF[row.name], "BLOCK_M": unpaired.BLOCK_M}
            # tokens with a baseline that is given, sums with a computed one
            computed = unpaired.COMPUTED_BASELINE_OF.get(row.name, unpaired.NO_BASELINE)
            constexprs["BASELINE"] = unpaired.GIVEN if has_offsets else computed
            constexprs |= dict(zip(("BLOCK_S", "BLOCK_T"), size, strict=True))
            kernel = unpaired._unpaired_preference_loss_fwd_kernel
            label = f"{row.name} {'tokens' if has_offsets else 'sums'}"
            found.append((kernel, label, constexprs, unpaired.NUM_WARPS))
    constexprs = {"HAS_OFFSETS": True, "REF": 2, "BLOCK_S": 1, "BLOCK_T": unpaired.TOKENS_BLOCKS[1]}
    found.append((unpaired._unpaired_preference_loss_fwd_sums_kernel, "", constexprs, 4))
    bwd = unpaired_preference_loss_bwd
    constexprs = {"BLOCK_N": bwd.BLOCK_N}
    kernel = bwd._unpaired_preference_loss_bwd_tokens_kernel
    found.append((kernel, "", constexprs, bwd.NUM_WARPS))
    for kernel, label, constexprs, num_warps in found:
        signature = _signature(kernel, constexprs, "fp32", None)
        if "listwise" in kernel.fn.__name__:
            fields = ListwiseParameters._fields
            signature["parameters"] = ListwiseParameters(*("fp32",) * len(fields))
        elif "parameters" in signature:
            fields = UnpairedParameters._fields
            signature["parameters"] = UnpairedParameters(*("fp32",) * len(fields))
        yield Case(
            kernel=kernel,
            arch=arch,
            tile=f"fp32 {label}".strip(),
            signature=signature,
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=3,
            shared_limit_bytes=SHARED_LIMIT_BYTES[arch],
            fp_fusion=False,
        )


def _signature(
    kernel: Any,
    constexprs: dict[str, Any],
    dtype: str,
    tile: Tile | None,
    side: SidePointers | None = None,
) -> dict[str, Any]:
    """Return the type of every argument; names carry the types (see the pointer comments)."""
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in ("hidden", "weight", "grad"):
            rows = tile.block_v if name == "weight" else tile.block_n
            columns = tile.block_v if name == "grad" else tile.block_h
            box = f"tensordesc<{dtype}[{rows}, {columns}]>"
            signature[name] = box if tile.tma else f"*{dtype}"
        elif name in _COMPUTE_DTYPE:
            signature[name] = f"*{dtype}"
        elif name in ("chosen", "rejected", "response"):
            signature[name] = side
        elif name == "parameters":
            signature[name] = Parameters(*("fp32",) * len(Parameters._fields))
        elif name == "weights":
            signature[name] = ("fp32",) * len(constexprs["KINDS"])
        elif name == "terms":
            # see preference_terms.py: each member is a constexpr of its own
            signature[name] = ("constexpr",) * len(constexprs["KINDS"])
        elif name == "out_ptr":
            signature[name] = "*fp16"
        elif name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
    return signature
