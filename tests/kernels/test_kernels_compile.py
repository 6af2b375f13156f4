"""Every tile row compiles for sm_80, sm_90 and sm_100 without spills; not interpreted."""

import pytest

from spo_kernels.calls.backends import triton_interpreter_on

pytest.importorskip("triton")
if triton_interpreter_on():
    pytest.skip("needs TRITON_INTERPRET=0 (make test runs it so)", allow_module_level=True)

import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from spo_kernels.calls.layout import padded_columns
from spo_kernels.calls.loss_table import LOSS_TYPES, MAX_BATCH_PAIRS
from spo_kernels.kernels import aot, preference_loss
from spo_kernels.kernels.tiles import RACED, TILES

# bytes a thread may spill: everything at once (softcap, bias, LoRA, all statistics), the forward
# under TRL's outputs (where a part of a tile holds a label), the gradient tile under a softcap,
# which shares an SM with another, fp32 tiles, whose products take H instructions a logit. Nothing
# else may
EVERYTHING_STACK_BYTES = 160
FORWARD_STACK_BYTES = 16
CAPPED_STACK_BYTES = 8
FLOAT_STACK_BYTES = 16
# small tiles that are raced for a second program beside the first pay for it in a few spills
RACED_STACK_BYTES = 128
# what each kernel that moves tiles must load and store at once by a thread; 0: nothing to move
TILE_BYTES = {
    "linear_logprob_fwd_kernel": (0, 16),
    "linear_logprob_bwd_logits_kernel": (0, 16),
    "linear_logprob_bwd_exps_kernel": (16, 16),
    "linear_logprob_bwd_weight_kernel": (0, 16),
    "linear_logprob_rescale_kernel": (16, 16),
    "linear_logprob_direction_kernel": (16, 16),
    "degree_loss_fwd_sums_kernel": (16, 0),
    "degree_loss_fwd_pool_kernel": (16, 16),
    "degree_loss_fwd_views_kernel": (16, 16),
    "degree_loss_bwd_hidden_kernel": (16, 16),
}


def check(row: aot.AotRow, ceiling: int = 0) -> None:
    if row.tile.endswith("everything"):
        ceiling = EVERYTHING_STACK_BYTES
    elif " fp32 " in row.tile and ("_logits_" in row.kernel or "prob_fwd" in row.kernel):
        ceiling = FLOAT_STACK_BYTES
    elif "prob_fwd" in row.kernel:
        ceiling = max(ceiling, FORWARD_STACK_BYTES)
    elif row.tile.endswith(" capped"):
        ceiling = max(ceiling, CAPPED_STACK_BYTES)
    assert row.stack_bytes <= ceiling, row
    assert row.spill_bytes == 0 and not row.is_serialized, row
    assert row.shared_bytes <= row.shared_limit_bytes, row
    assert row.registers <= 255, row
    # rows that are not aligned move entry by entry
    is_unaligned = f" {row.arch} bf16 pointer" in row.tile and row.arch != "sm_80"
    if not row.tile.endswith(" logps") and not (is_unaligned and "weight" in row.kernel):
        load, store = TILE_BYTES.get(row.kernel, (0, 0))
        assert row.load_bytes >= load and row.store_bytes >= store, row
    if any(part in row.kernel for part in ("_logits_", "prob_fwd", "bwd_weight")):
        if "bf16" in row.tile:
            expected = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}[row.arch]
            assert row.instruction == expected, row


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_small_kernels(arch):
    """The kernels without a tile row: rows, kept exponentials, all loss types, degree loss."""
    for name, variant in (
        ("reduce", ""),
        ("rescale", ""),
        ("direction", ""),
        ("exps", ""),
        ("_preference_loss_", " no extras"),
        ("_preference_loss_", " own"),
        ("_preference_loss_", " every"),
        ("unpaired", ""),
        ("listwise", ""),
        ("degree_loss", ""),
        ("bradley", ""),
    ):
        rows = aot.report(archs=(arch,), kernels=name, variant=variant)
        assert rows, name
        for row in rows:
            check(row)


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_preference_loss_types(arch):
    """Each type of ``preference_loss`` alone; a third of them an arch, all in the soak test."""
    for loss in LOSS_TYPES[aot.ARCHS.index(arch) :: len(aot.ARCHS)]:
        rows = aot.report(archs=(arch,), kernels="_preference_loss_", variant=f" {loss.name}")
        shapes = {row.tile.removeprefix("fp32 ") for row in rows}
        for pairs in (16, MAX_BATCH_PAIRS) if loss.batch else (16,):
            assert {f"{pairs} pairs, {form} {loss.name}" for form in ("sums", "tokens")} <= shapes
        for row in rows:
            check(row)


def test_an_edited_loss_is_another_kernel():
    """The key of the cache on disk holds the source of the jit functions a kernel is handed."""
    fwd = preference_loss._preference_loss_fwd_kernel
    place = fwd.arg_names.index("terms")
    sigmoid = preference_loss.TERM_OF["sigmoid"]
    edited = triton.JITFunction(sigmoid.fn)
    edited._unsafe_update_src(edited.src.replace("loss, -lost", "loss, lost"))
    assert edited.src != sigmoid.src and repr(edited) == repr(sigmoid)

    def key_of(term):
        signature = dict.fromkeys(fwd.arg_names, "i32")
        signature |= {"terms": ("constexpr",), "KINDS": "constexpr"}
        return ASTSource(fwd, signature, {(place, 0): term, "KINDS": ("pair",)}).hash()

    assert key_of(sigmoid) == key_of(triton.JITFunction(sigmoid.fn)) != key_of(edited)

    # and a launch hands them over so: each member of the tuple is a constexpr of its own
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for term in (sigmoid, edited):
        kind, key = native_specialize_impl(type(backend), (term,), False, True, True)
        assert kind == ("constexpr",) and key == (term.cache_key,)


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize(
    "kernel", ["linear_logprob_fwd", "linear_logprob_bwd_logits", "linear_logprob_bwd_weight"]
)
def test_tile_rows(arch, kernel):
    """Every row of the tile table under the switches TRL's DPO trainer asks for."""
    kind, *variants = {
        "linear_logprob_fwd": ("fwd", "dpo+exps", "dpo+exps scaled"),
        "linear_logprob_bwd_logits": ("bwd", "capped"),
        "linear_logprob_bwd_weight": ("weight", "plain"),
    }[kernel]
    classes = {arch, "small"} if arch == "sm_80" else {arch}
    for variant in variants:
        rows = aot.report(archs=(arch,), kernels=kernel, variant=f" {variant}")
        assert len(rows) == sum(key[0] == kind and key[1] in classes for key in TILES)
        for row in rows:
            check(row)


@pytest.mark.parametrize("arch_class", [key[0] for key in RACED])
@pytest.mark.parametrize("kind", ["fwd", "bwd"])
def test_raced_tiles(arch_class, kind):
    """What ``spo-kernels tune`` races keeps the ceilings of the table, but for a few spills."""
    kernel, variant = ("logprob_fwd", "dpo+exps") if kind == "fwd" else ("bwd_logits", "capped")
    for (candidates_for, loads), candidates in RACED.items():
        for tile in candidates if candidates_for == arch_class else ():
            tiles = {(kind, arch_class, "half", loads): tile}
            (row,) = aot.report((arch_class,), kernel, variant, tiles)
            check(row, RACED_STACK_BYTES)


@pytest.mark.soak
def test_every_variant():
    """The whole report of ``spo-kernels aot``; minutes."""
    for row in aot.report():
        check(row)


@pytest.mark.parametrize("vocab_size", [1, 77, 50257, 151665])
def test_padded_strides(vocab_size):
    """The report takes strides of tiles for multiples of 16: without that 2 bytes are stored."""
    assert padded_columns(vocab_size) % 16 == 0


def test_unknown_arch():
    with pytest.raises(ValueError, match="aot: archs must be among sm_80, .*, got sm_12"):
        aot.report(archs=("sm_12",))
