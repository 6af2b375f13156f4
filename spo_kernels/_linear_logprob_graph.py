"""``linear_logprob`` as custom ops: what ``torch.compile`` puts into its graph.

A graph cannot branch on what a tensor holds and must know every shape before it runs, so nothing is
read on the host: rows are chosen outside (``graph_rows_of``), and the strategy, which decides what
is kept for the backward, is fixed while tracing. Chunks are planned inside the op from real sizes,
and every result has the bits of an eager call on the same rows.
"""

from operator import index
from typing import Any, NamedTuple

import torch

from spo_kernels._call import Call, Inputs, Kept, RowGrads, Rows
from spo_kernels._linear_inputs import backend_of, plan_question, planned_device
from spo_kernels.planner import GRAD_INPUTS, OUTPUTS, plan_linear_logprob

# more rows than any call has
_MANY_ROWS = 1 << 31


class GraphCall(NamedTuple):
    """Settings of a call as the ops take them, in the order of their arguments."""

    outputs: str  # names, separated by commas
    needs_grad: str
    strategy: str
    backend: str
    compute_dtype: torch.dtype
    temperature: float
    logit_scale: float
    softcap: float | None
    budget_bytes: int | None

    def planned(self, rows: Rows, inputs: Inputs) -> Call:
        """Return the call for these rows."""
        outputs, needs = _names(self.outputs), frozenset(_names(self.needs_grad))
        plan = plan_linear_logprob(
            **plan_question(
                rows,
                inputs[:5],
                compute_dtype=self.compute_dtype,
                needs_grad=needs,
                outputs=outputs,
                softcap=self.softcap,
            ),
            budget_bytes=self.budget_bytes,
            strategy=self.strategy,
            device=planned_device(self.backend, inputs.hidden.device),
        )
        return Call(
            backend=self.backend,
            strategy=plan.strategy,
            row_chunk=plan.row_chunk,
            vocab_chunk=plan.vocab_chunk,
            outputs=frozenset(outputs),
            needs_grad=needs,
            compute_dtype=self.compute_dtype,
            temperature=self.temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )


def linear_logprob_in_graph(
    tensors: tuple[torch.Tensor | None, ...],
    labels: torch.Tensor,
    rows: Rows,
    settings: GraphCall,
    question: dict[str, Any],
) -> tuple[torch.Tensor | None, ...]:
    """Return the row outputs in the order of ``OUTPUTS``; the question is the planner's."""
    if settings.strategy == "auto":
        # a number that is traced is a symbol, and whether there is one is all that a plan asks
        capped = None if settings.softcap is None else 1.0
        small, most, large = _strategies_by_rows(
            settings.backend,
            tensors[0].device,
            None if settings.budget_bytes is None else index(settings.budget_bytes),
            {**question, "rows": 0, "softcap": capped},
        )
        # one guard, where a choice by the planner itself would be a graph for each row count
        strategy = small if most is None or rows.count <= most else large
        settings = settings._replace(strategy=strategy)
    places = None if rows.index is None else torch.stack(rows.index)
    found = _forward_op(*tensors, labels, places, *settings)
    values = dict(zip(_names(settings.outputs), found, strict=False))
    if "log_sum_sq_probs" in values:
        values["log_sum_sq_probs"] = values["log_sum_sq_probs"].detach()
    return tuple(values.get(name) for name in OUTPUTS)


@torch.compiler.assume_constant_result
def _strategies_by_rows(
    backend: str,
    device: torch.device,
    budget_bytes: int | None,
    question: dict[str, Any],
) -> tuple[str, int | None, str | None]:
    """Return what the planner runs up to some number of rows, that number, and what beyond it."""

    def choice(rows: int) -> str | None:
        try:
            plan = plan_linear_logprob(
                **{**question, "rows": rows},
                budget_bytes=budget_bytes,
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


@torch.library.custom_op("spo_kernels::linear_logprob_fwd", mutates_args=())
def _forward_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    labels: torch.Tensor,
    places: torch.Tensor | None,
    outputs: str,
    needs_grad: str,
    strategy: str,
    backend: str,
    compute_dtype: torch.dtype,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget_bytes: int | None,
) -> list[torch.Tensor]:
    """Return the row outputs asked for in the labels' shape, then the fields of ``Kept``."""
    settings = GraphCall(
        outputs,
        needs_grad,
        strategy,
        backend,
        compute_dtype,
        temperature,
        logit_scale,
        softcap,
        budget_bytes,
    )
    inputs = Inputs(hidden, weight, bias, lora_a, lora_b, labels)
    rows = _rows_of(hidden, labels, places)
    with torch.autocast(hidden.device.type, enabled=False):
        values, kept = backend_of(backend).forward(settings.planned(rows, inputs), rows, inputs)
    found = [rows.spread(values[name]) for name in _names(outputs)]
    return [*found, *(hidden.new_zeros(()) if value is None else value for value in kept)]


@_forward_op.register_fake
def _(hidden, weight, bias, lora_a, lora_b, labels, places, *settings):
    settings = GraphCall(*settings)
    # what the backend itself allocates for no rows: an axis of length 0 is theirs
    none = Rows(0, torch.Size((0,)), None)
    lora_a = None if lora_a is None else lora_a.new_empty(0, lora_a.shape[-1])
    inputs = Inputs(hidden.new_empty(0, hidden.shape[-1]), weight, bias, lora_a, lora_b, labels[:0])
    values, kept = backend_of(settings.backend).forward(
        settings.planned(none, inputs), none, inputs
    )
    N = labels.shape[0]
    found = [values[name].new_empty(hidden.shape[:-1]) for name in _names(settings.outputs)]
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
    settings = GraphCall(*inputs[7:])
    asked = _names(settings.outputs)
    ctx.save_for_backward(*inputs[:7], *output[len(asked) :])
    ctx.settings = settings


def _backward(ctx: Any, grads: list[torch.Tensor | None]):
    inputs, kept = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    arrived = dict(zip(_names(ctx.settings.outputs), grads, strict=False))
    upstream = [arrived.get(name) for name in RowGrads._fields]
    need = [name for name, needed in zip(GRAD_INPUTS, ctx.needs_input_grad, strict=False) if needed]
    found = {}
    if need and any(grad is not None for grad in upstream):
        values = _backward_op(upstream, *inputs, list(kept), ",".join(need), *ctx.settings)
        found = dict(zip(need, values, strict=True))
    return (*(found.get(name) for name in GRAD_INPUTS), *(None,) * (2 + len(ctx.settings)))


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("spo_kernels::linear_logprob_bwd", mutates_args=())
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
    need: str,
    outputs: str,
    needs_grad: str,
    strategy: str,
    backend: str,
    compute_dtype: torch.dtype,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    budget_bytes: int | None,
) -> list[torch.Tensor]:
    """Return the gradients named in ``need``, in its order."""
    settings = GraphCall(
        outputs,
        needs_grad,
        strategy,
        backend,
        compute_dtype,
        temperature,
        logit_scale,
        softcap,
        budget_bytes,
    )
    inputs = Inputs(hidden, weight, bias, lora_a, lora_b, labels)
    rows = _rows_of(hidden, labels, places)
    # a field that was None is a scalar here
    kept = Kept(*(value if value.dim() else None for value in kept))
    dtype = kept.logsumexp.dtype
    grads = RowGrads(*(None if g is None else rows.take_all(g).to(dtype) for g in upstream))
    names = _names(need)
    call = settings.planned(rows, inputs)
    with torch.autocast(hidden.device.type, enabled=False):
        found = backend_of(backend).backward(call, rows, inputs, kept, grads, frozenset(names))
    return [found[name] for name in names]


@_backward_op.register_fake
def _(upstream, hidden, weight, bias, lora_a, lora_b, labels, places, kept, need, *settings):
    given = dict(zip(GRAD_INPUTS, (hidden, weight, bias, lora_a, lora_b), strict=True))
    return [given[name].new_empty(given[name].shape) for name in _names(need)]


def _rows_of(hidden: torch.Tensor, labels: torch.Tensor, places: torch.Tensor | None) -> Rows:
    axes = None if places is None else places.unbind()
    return Rows(labels.shape[0], hidden.shape[:-1], axes)


def _names(joined: str) -> tuple[str, ...]:
    return tuple(joined.split(",")) if joined else ()
