"""How tiles lie in memory; the kernels and the planner's byte counts must agree on it."""

import math

# the torch backend walks the vocabulary in steps of this many columns whatever the strategy, so
# that a row's log-prob never depends on the plan; a row chunk keeps one tile inside the caches
TORCH_VOCAB_CHUNK = 4096
# a product of fewer rows than this is padded to them
TORCH_MIN_ROWS = 16
# the triton forward takes one partial statistic of this many columns
PART_V = 64
# rows of tiles end at a multiple of this many columns: triton tells a stride that 16 divides from
# others, and only then writes 16 bytes at once
COLUMN_PAD = 16
# up to so many rows a kernel of ours makes the head's gradient: 8 bytes an entry less traffic than
# a library's product, against up to 15% more time for it, at 785 TFLOP/s and 4.3 TB/s. On an H200
# at 8192 rows the kernel took 0.94 of cuBLAS's time with fp32 out at H 4096, 1.09 at 2048, 1.14 at
# 896; where the two cross is unmeasured
WEIGHT_KERNEL_ROWS = 4096
# a head that must be cast or made contiguous is copied in slices of about this size
_HEAD_SLICE_BYTES = 32 << 20
HEAD_SLICE_COLUMNS = 1024


def padded_columns(columns: int) -> int:
    """Return the columns a row of tiles is allocated with; TMA and cuBLAS want them aligned too."""
    return math.ceil(columns / COLUMN_PAD) * COLUMN_PAD


def head_slice_columns(vocab_size: int, hidden_size: int, itemsize: int, copied: bool) -> int:
    """Return how many head rows the triton backend hands to a kernel at once."""
    if not copied:
        return vocab_size
    columns = _HEAD_SLICE_BYTES // (hidden_size * itemsize) // HEAD_SLICE_COLUMNS
    return min(vocab_size, max(1, columns) * HEAD_SLICE_COLUMNS)
