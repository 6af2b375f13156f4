"""The tile table: which tile each kernel runs with, by architecture and dtype.

A tile is never chosen by row count, strategy or outputs, so a row's log-prob has the same bits
wherever it is computed. Rows were chosen by compiling ahead of time: the largest tile that spills
next to nothing under the outputs TRL asks for (``spo-kernels aot`` prints the report);
``spo-kernels tune`` times them beside others on a GPU. ``TUNING.md`` beside this file says what was
tried, with which compiler, and when.
"""

import dataclasses

import torch

_SM_REGISTERS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Tile:
    """One row of the table."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    tma: bool = False
    programs_per_sm: int = 1
    block_r: int = 16
    group_n: int = 8

    @property
    def max_registers(self) -> int:
        """Registers a thread may use so that ``programs_per_sm`` programs run side by side."""
        # registers are handed out 8 a thread
        return min(255, _SM_REGISTERS // (32 * self.num_warps * self.programs_per_sm) // 8 * 8)


# (kernel, architecture class, dtype class, loads). "tma" rows need 16-byte aligned rows, "pointer"
# rows take anything.
# for little shared memory
_SMALL = Tile(64, 128, 32, 4, 3, programs_per_sm=2)
# half rows that are not aligned: rare
_UNALIGNED = Tile(128, 128, 32, 8, 3)
_FLOAT = Tile(64, 64, 16, 4, 2, programs_per_sm=2)
TILES: dict[tuple[str, str, str, str], Tile] = {
    ("fwd", "sm_80", "half", "pointer"): Tile(128, 256, 32, 8, 3),
    ("fwd", "sm_90", "half", "pointer"): _UNALIGNED,
    ("fwd", "sm_90", "half", "tma"): Tile(128, 256, 64, 8, 3, tma=True),
    ("fwd", "sm_100", "half", "pointer"): _UNALIGNED,
    ("fwd", "sm_100", "half", "tma"): Tile(128, 256, 64, 8, 3, tma=True),
    ("fwd", "small", "half", "pointer"): _SMALL,
    ("fwd", "sm_80", "float", "pointer"): _FLOAT,
    ("fwd", "sm_90", "float", "pointer"): _FLOAT,
    ("fwd", "sm_100", "float", "pointer"): _FLOAT,
    ("fwd", "small", "float", "pointer"): _FLOAT,
    ("bwd", "sm_80", "half", "pointer"): Tile(128, 128, 32, 8, 3),
    ("bwd", "sm_90", "half", "pointer"): _UNALIGNED,
    ("bwd", "sm_90", "half", "tma"): Tile(128, 128, 64, 8, 3, tma=True, programs_per_sm=2),
    ("bwd", "sm_100", "half", "pointer"): _UNALIGNED,
    ("bwd", "sm_100", "half", "tma"): Tile(128, 128, 64, 4, 3, tma=True, programs_per_sm=2),
    ("bwd", "small", "half", "pointer"): _SMALL,
    ("bwd", "sm_80", "float", "pointer"): _FLOAT,
    ("bwd", "sm_90", "float", "pointer"): _FLOAT,
    ("bwd", "sm_100", "float", "pointer"): _FLOAT,
    ("bwd", "small", "float", "pointer"): _FLOAT,
    # block_n is what a step of the sum over rows takes
    ("weight", "sm_80", "half", "pointer"): Tile(32, 128, 128, 8, 3),
    ("weight", "sm_90", "half", "pointer"): Tile(32, 128, 64, 4, 3, programs_per_sm=2),
    ("weight", "sm_90", "half", "tma"): Tile(64, 128, 256, 8, 3, tma=True),
    ("weight", "sm_100", "half", "pointer"): Tile(32, 128, 64, 4, 3, programs_per_sm=2),
    ("weight", "sm_100", "half", "tma"): Tile(64, 128, 128, 4, 3, tma=True, programs_per_sm=2),
    ("weight", "small", "half", "pointer"): Tile(32, 128, 64, 4, 3, programs_per_sm=2),
}

# what ``spo-kernels tune`` races on a GPU for the rows of half dtypes, by (architecture class,
# loads): large tiles in two orders (16 row blocks read a fifth less a wave, and more has to stay in
# L2), and small ones of which a second runs while the first one ends
RACED: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("sm_80", "pointer"): (
        Tile(128, 256, 32, 8, 3),
        Tile(128, 256, 32, 8, 4),
        Tile(128, 128, 32, 8, 3),
        Tile(128, 128, 32, 4, 3, programs_per_sm=2),
    ),
    ("sm_90", "tma"): (
        Tile(128, 256, 64, 8, 3, tma=True),
        Tile(128, 256, 64, 8, 3, tma=True, group_n=16),
        Tile(128, 256, 64, 8, 4, tma=True),
        Tile(256, 128, 64, 8, 3, tma=True),
        Tile(128, 128, 64, 8, 4, tma=True),
        Tile(128, 128, 64, 8, 3, tma=True, programs_per_sm=2),
        Tile(128, 128, 64, 4, 3, tma=True, programs_per_sm=2),
    ),
    ("sm_100", "tma"): (
        Tile(128, 256, 64, 8, 3, tma=True),
        Tile(128, 256, 64, 8, 3, tma=True, group_n=16),
        Tile(128, 256, 64, 8, 4, tma=True),
        Tile(128, 128, 64, 8, 3, tma=True, programs_per_sm=2),
        Tile(128, 128, 64, 4, 3, tma=True, programs_per_sm=2),
    ),
}

# devices such as sm_86, sm_89 and sm_120 have about 99 KiB of shared memory a block
_SMALL_SHARED_BYTES = 120 * 1024


def arch_class_of(arch: str, shared_bytes: int) -> str:
    """Return which rows of the table an architecture ("sm_90") takes."""
    if shared_bytes < _SMALL_SHARED_BYTES:
        return "small"
    number = int(arch.removeprefix("sm_"))
    return "sm_100" if number >= 100 else "sm_90" if number >= 90 else "sm_80"


def tile_for(kernel: str, arch: str, dtype: torch.dtype, *, shared_bytes: int, tma: bool) -> Tile:
    """Return the tile of ``kernel`` ("fwd", "bwd" or "weight") on ``arch`` ("sm_90")."""
    dtype_class = "float" if dtype == torch.float32 else "half"
    arch_class = arch_class_of(arch, shared_bytes)
    row = TILES.get((kernel, arch_class, dtype_class, "tma")) if tma else None
    return row or TILES[(kernel, arch_class, dtype_class, "pointer")]
