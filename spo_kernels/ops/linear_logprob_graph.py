"""``linear_logprob`` as custom ops: what ``torch.compile`` puts into its graph.

A graph cannot branch on what a tensor holds and must know every shape before it runs, so nothing is
read on the host: rows are chosen outside (``graph_rows_of``), and the strategy, which decides what
is kept for the backward, is fixed while tracing. Chunks are planned inside the op from real sizes,
and every result has the bits of an eager call on the same rows.
"""

from operator import index
from typing import Any

import torch

from spo_kernels.calls.linear_logprob import Inputs, Kept, RowGrads, Rows, Settings
from spo_kernels.calls.plan import GRAD_INPUTS, OUTPUTS
from spo_kernels.ops.linear_logprob_call import (
    backend_of,
    planned_call,
    planned_device,
    sizes_of,
)
from spo_kernels.planner.linear_logprob import plan_sizes
from spo_kernels.planner.models import Sizes

# more rows than any call has
_MANY_ROWS = 1 << 31


def linear_logprob_in_graph(
    tensors: tuple[torch.Tensor | None, ...],
    labels: torch.Tensor,
    rows: Rows,
    settings: Settings,
) -> tuple[torch.Tensor | None, ...]:
    """Return the row outputs in the order of ``OUTPUTS``."""
    if settings.strategy == "auto":
        budget_bytes = settings.budget_bytes
        small, most, large = _strategies_by_rows(
            settings.backend,
            tensors[0].device,
            None if budget_bytes is None else index(budget_bytes),
            # all but the number of rows, which is a symbol in a traced graph
            sizes_of(settings, rows, tensors)[1:],
        )
        # one guard, where a choice by the planner itself would be a graph for each row count
        strategy = small if most is None or rows.count <= most else large
        settings = settings._replace(strategy=strategy)
    places = None if rows.index is None else torch.stack(rows.index)
    found = _forward_op(*tensors, labels, places, *_packed(settings))
    values = dict(zip(sorted(settings.outputs), found, strict=False))
    if "log_sum_sq_probs" in values:
        values["log_sum_sq_probs"] = values["log_sum_sq_probs"].detach()
    return tuple(values.get(name) for name in OUTPUTS)


@torch.compiler.assume_constant_result
def _strategies_by_rows(
    backend: str, device: torch.device, budget_bytes: int | None, sizes: tuple
) -> tuple[str, int | None, str | None]:
    """Return the strategy planned up to some number of rows, that number, and the one above it."""

    def choice(rows: int) -> str | None:
        try:
            plan = plan_sizes(
                Sizes(rows, *sizes),
                budget_bytes=budget_bytes,
                strategy="auto",
                device=planned_device(backend, device),
            )
        except ValueError:
            # nothing fits: the call itself says so
            return None
        return plan.strategy

    small = choice(1)
    if small is None or choice(_MANY_ROWS) == small:
        return small or "auto", None, None
    most, beyond = 1, _MANY_ROWS
    while beyond - most > 1:
        middle = (most + beyond) // 2
        if choice(middle) == small:
            most = middle
        else:
            beyond = middle
    return small, most, choice(beyond) or small


# both ops take the tensors of a call and then its settings
_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor labels, "
    "Tensor? places"
)
_SETTINGS = (
    "str backend, ScalarType compute_dtype, str[] needs_grad, str[] outputs, float temperature, "
    "float logit_scale, float? softcap, str strategy, int? budget_bytes"
)


def _packed(settings: Settings) -> tuple[Any, ...]:
    """Return the settings as a schema can hold them; ``_unpacked`` is the way back."""
    sets = {name: sorted(getattr(settings, name)) for name in ("needs_grad", "outputs")}
    return tuple(settings._replace(**sets))


def _unpacked(packed: tuple[Any, ...]) -> Settings:
    settings = Settings(*packed)
    return settings._replace(
        needs_grad=frozenset(settings.needs_grad), outputs=frozenset(settings.outputs)
    )


@torch.library.custom_op(
    "spo_kernels::linear_logprob_fwd",
    mutates_args=(),
    schema=f"({_TENSORS}, {_SETTINGS}) -> Tensor[]",
)
def _forward_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    labels: torch.Tensor,
    places: torch.Tensor | None,
    *packed: Any,
) -> list[torch.Tensor]:
    """Return the row outputs asked for in the labels' shape, then the fields of ``Kept``."""
    settings = _unpacked(packed)
    inputs = Inputs(hidden, weight, bias, lora_a, lora_b, labels)
    rows = _rows_of(hidden, labels, places)
    with torch.autocast(hidden.device.type, enabled=False):
        values, kept = backend_of(settings.backend).forward(
            planned_call(settings, rows, inputs[:5]), rows, inputs
        )
    found = [rows.spread(values[name]) for name in sorted(settings.outputs)]
    return [*found, *(hidden.new_zeros(()) if value is None else value for value in kept)]


@_forward_op.register_fake
def _(hidden, weight, bias, lora_a, lora_b, labels, places, *packed):
    settings = _unpacked(packed)
    # run the backend on zero rows: every axis of length 0 is the row axis N
    none = Rows(0, torch.Size((0,)), None)
    lora_a = None if lora_a is None else lora_a.new_empty(0, lora_a.shape[-1])
    inputs = Inputs(hidden.new_empty(0, hidden.shape[-1]), weight, bias, lora_a, lora_b, labels[:0])
    values, kept = backend_of(settings.backend).forward(
        planned_call(settings, none, inputs[:5]), none, inputs
    )
    N = labels.shape[0]
    found = [values[name].new_empty(hidden.shape[:-1]) for name in sorted(settings.outputs)]
    for value in kept:
        if value is None:
            found.append(hidden.new_empty(()))
        elif value.shape[0] == 0:
            found.append(value.new_empty_strided((N, *value.shape[1:]), value.stride()))
        else:
            found.append(value.new_empty([size or N for size in value.shape]))
    return found


def _setup_context(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.packed = inputs[7:]
    ctx.asked = sorted(_unpacked(ctx.packed).outputs)
    ctx.save_for_backward(*inputs[:7], *output[len(ctx.asked) :])


def _backward(ctx: Any, grads: list[torch.Tensor | None]):
    inputs, kept = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    arrived = dict(zip(ctx.asked, grads, strict=False))
    upstream = [arrived.get(name) for name in RowGrads._fields]
    need = [name for name, needed in zip(GRAD_INPUTS, ctx.needs_input_grad, strict=False) if needed]
    found = {}
    if need and any(grad is not None for grad in upstream):
        values = _backward_op(upstream, *inputs, list(kept), need, *ctx.packed)
        found = dict(zip(need, values, strict=True))
    return (*(found.get(name) for name in GRAD_INPUTS), *(None,) * (2 + len(ctx.packed)))


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "spo_kernels::linear_logprob_bwd",
    mutates_args=(),
    schema=f"(Tensor?[] upstream, {_TENSORS}, Tensor[] kept, str[] need, {_SETTINGS}) -> Tensor[]",
)
def _backward_op(
    upstream: list[torch.Tensor | None],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    labels: torch.Tensor,
    places: torch.Tensor | None,
    kept: list[torch.Tensor],
    need: list[str],
    *packed: Any,
) -> list[torch.Tensor]:
    """Return the gradients named in ``need``, in its order."""
    settings = _unpacked(packed)
    inputs = Inputs(hidden, weight, bias, lora_a, lora_b, labels)
    rows = _rows_of(hidden, labels, places)
    # a field that was None is a scalar here
    kept = Kept(*(value if value.dim() else None for value in kept))
    dtype = kept.logsumexp.dtype
    grads = RowGrads(*(None if g is None else rows.take_all(g).to(dtype) for g in upstream))
    call = planned_call(settings, rows, inputs[:5])
    with torch.autocast(hidden.device.type, enabled=False):
        found = backend_of(settings.backend).backward(
            call, rows, inputs, kept, grads, frozenset(need)
        )
    return [found[name] for name in need]


@_backward_op.register_fake
def _(upstream, hidden, weight, bias, lora_a, lora_b, labels, places, kept, need, *packed):
    given = dict(zip(GRAD_INPUTS, (hidden, weight, bias, lora_a, lora_b), strict=True))
    return [given[name].new_empty(given[name].shape) for name in need]


def _rows_of(hidden: torch.Tensor, labels: torch.Tensor, places: torch.Tensor | None) -> Rows:
    axes = None if places is None else places.unbind()
    return Rows(labels.shape[0], hidden.shape[:-1], axes)
