"""Ahead-of-time report: compile every kernel and tile without a GPU, read what each one uses.

Registers, stack and spills come from the ``cuobjdump`` that ships with triton; what is compiled
here is what runs, because tiles come from the same table and switches from the same constants.
"""

import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spo_kernels._plan_models import PART_V
from spo_kernels.kernels import (
    bradley_terry_loss,
    degree_loss,
    degree_loss_bwd,
    linear_logprob,
    linear_logprob_bwd,
    linear_logprob_bwd_weight,
    linear_logprob_rows,
    listwise_preference_loss,
    logits_tile,
    preference_loss,
    preference_loss_bwd,
    unpaired_preference_loss,
    unpaired_preference_loss_bwd,
)
from spo_kernels.kernels.pair_tokens import MAX_REGISTERS, SidePointers, blocks
from spo_kernels.kernels.tiles import TILES, Tile
from spo_kernels.loss_table import (
    LISTWISE_LOSS_TYPES,
    LOSS_TYPES,
    MAX_BATCH_PAIRS,
    UNPAIRED_LOSS_TYPES,
    ListwiseParameters,
    Parameters,
    UnpairedParameters,
)

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
    "fwd": (linear_logprob._linear_logprob_fwd_kernel, _FWD_SWITCHES),
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
class AotRow:
    """What one compiled kernel uses."""

    kernel: str
    arch: str
    tile: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    instruction: str
    load_bytes: int
    store_bytes: int


@dataclasses.dataclass(frozen=True)
class _Case:
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


def report(
    archs: tuple[str, ...] = ARCHS,
    kernels: str = "",
    variant: str = "",
    tiles: Mapping[tuple[str, str, str, str], Tile] = TILES,
) -> list[AotRow]:
    """Compile what has ``kernels`` in its kernel's name and ends in ``variant``; one row each."""
    unknown = [arch for arch in archs if arch not in ARCHS]
    if unknown:
        raise ValueError(f"aot: archs must be among {', '.join(ARCHS)}, got {unknown[0]}")
    cases = [
        case
        for case in _cases(archs, tiles)
        if kernels in case.kernel.fn.__name__ and case.tile.endswith(variant)
    ]
    # ptxas runs outside the interpreter lock
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(_compile, cases))


def _cases(
    archs: tuple[str, ...], tiles: Mapping[tuple[str, str, str, str], Tile]
) -> Iterator[_Case]:
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
            yield _Case(
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
            yield _Case(
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


def _preference_cases(arch: str) -> Iterator[_Case]:
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
        is_coupled = any(row.sorts or row.has_statistic for row in rows)
        kernels = (fwd, bwd) if is_coupled or len(rows) > 1 or name == "no extras" else (fwd,)
        for has_tokens in (False, True):
            for kernel in kernels:
                is_batch = kernel is fwd and any(row.batch for row in rows)
                block_p, block_t, num_warps = blocks(pairs, has_tokens, is_batch)
                constexprs = {"BLOCK_P": block_p, "BLOCK_T": block_t}
                constexprs["LOSSES"] = tuple(row.id for row in rows)
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
                yield _Case(
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


def _list_cases(arch: str) -> Iterator[_Case]:
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
            constexprs = {"HAS_REF": True, "HAS_MASK": True, "LOSS": row.id, "BLOCK_K": block_k}
            found.append((kernel, f"{row.name} K {block_k}", constexprs, num_warps))
    unpaired = unpaired_preference_loss
    for row in UNPAIRED_LOSS_TYPES:
        for has_offsets in (False, True):
            size = unpaired.TOKENS_BLOCKS if has_offsets else unpaired.SUMS_BLOCKS
            constexprs = {"HAS_OFFSETS": has_offsets, "REF": 1 + has_offsets, "LOSS": row.id}
            constexprs |= {"BASELINE": 2 - has_offsets, "BLOCK_M": unpaired.BLOCK_M}
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
        yield _Case(
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
            signature[name] = ("fp32",) * len(constexprs["LOSSES"])
        elif name == "out_ptr":
            signature[name] = "*fp16"
        elif name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
    return signature


def _compile(case: _Case) -> AotRow:
    # what a launch finds divisible by 16: pointers and padded strides, and H and the row strides
    # but for the half rows that exist because those are not
    divisible = {"ROWS", "stride_exps_n", "stride_grad_n", "stride_grad_weight_v"}
    if not case.unaligned:
        divisible |= {"H", "stride_hidden_n", "stride_weight_v"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(case.signature.items())
        if name in divisible or (isinstance(kind, str) and kind.startswith("*"))
    } | {
        (i, k): [["tt.divisibility", 16]]
        for i, kinds in enumerate(case.signature.values())
        if isinstance(kinds, tuple)
        for k, kind in enumerate(kinds)
        if kind.startswith("*")
    }
    compiled = triton.compile(
        ASTSource(
            case.kernel,
            signature=case.signature,
            constexprs=case.constexprs,
            attrs=attributes,
        ),
        target=GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": case.fp_fusion,
            "maxnreg": case.max_registers,
        },
    )
    usage = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    found = [name for name in ("tcgen05", "wgmma", "mma.sync") if name in ptx]
    return AotRow(
        kernel=case.kernel.fn.__name__.strip("_"),
        arch=case.arch,
        tile=case.tile,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        spill_bytes=usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        shared_limit_bytes=case.shared_limit_bytes,
        instruction=found[0] if found else "",
        load_bytes=max(_access_bytes(ptx, "ld"), _copy_bytes(ptx)),
        store_bytes=_access_bytes(ptx, "st"),
    )


def _access_bytes(ptx: str, kind: str) -> int:
    """Return the most bytes that one global load ("ld") or store ("st") of a thread moves."""
    found = re.findall(rf"{kind}\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def _copy_bytes(ptx: str) -> int:
    """Return the same of an asynchronous copy to shared memory, TMA's apart."""
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*\], (0x[0-9a-f]+|\d+)", ptx)
    return max((int(size, 0) for size in sizes), default=0)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Return REG, STACK and LOCAL of a cubin."""
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"aot: cuobjdump printed no resource usage, got {text[:200]!r}")
    return usage
