"""Ahead-of-time report: compile every kernel and tile without a GPU, read what each one uses.

Registers, stack and spills come from the ``cuobjdump`` that ships with triton, whether products
wait for each other from its ``nvdisasm``.
"""

import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spo_kernels.kernels.aot_cases import ARCHS, Case, cases
from spo_kernels.kernels.tiles import TILES, Tile

_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class AotRow:
    """Resources and instructions of one compiled kernel."""

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
    is_serialized: bool


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
    chosen = [
        case
        for case in cases(archs, tiles)
        if kernels in case.kernel.fn.__name__ and case.tile.endswith(variant)
    ]
    # ptxas runs outside the interpreter lock
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(_compile, chosen))


def _compile(case: Case) -> AotRow:
    # a launch finds these divisible by 16: pointers, padded strides and usual ranks, and H and the
    # row strides but for the half rows that exist because those are not
    divisible = {"R", "ROWS", "stride_exps_n", "stride_grad_n", "stride_grad_weight_v"}
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
        is_serialized="wgmma" in ptx and _is_serialized(compiled.asm["cubin"]),
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
    text = _printed_by("cuobjdump", "--dump-resource-usage", cubin)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"aot: cuobjdump printed no resource usage, got {text[:200]!r}")
    return usage


def _is_serialized(cubin: bytes) -> bool:
    """Return whether every wgmma waits for the one before: each then commits a group of its own."""
    sass = _printed_by("nvdisasm", "-c", cubin)
    products = [line for line in sass.splitlines() if "HGMMA" in line]
    return len(products) > 1 and all("gsb0" in line for line in products)


def _printed_by(tool: str, option: str, cubin: bytes) -> str:
    """Return what one of triton's tools prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
