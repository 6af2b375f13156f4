"""Public ``linear_logprob``: per-token log-probs and their exact gradients without the logits."""

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from spo_kernels.calls.backends import refuse_fp64_on_triton, resolve_backend
from spo_kernels.calls.checks import (
    check_choice,
    fail,
    refuse_double_backward,
)
from spo_kernels.calls.linear_logprob import Call, Inputs, Kept, RowGrads, Rows, Settings
from spo_kernels.calls.linear_logprob_checks import check_head_inputs, check_transform
from spo_kernels.calls.plan import GRAD_INPUTS, OUTPUTS, STRATEGIES
from spo_kernels.ops import linear_logprob_vocab_parallel as vocab_parallel
from spo_kernels.ops.linear_logprob_call import backend_of, needed_grads, planned_call
from spo_kernels.ops.linear_logprob_graph import linear_logprob_in_graph
from spo_kernels.ops.linear_logprob_rows import graph_rows_of, reads_no_host, scored_rows_of

_OP = "linear_logprob"
_DIFFERENTIABLE = ("logps", "entropy", "logsumexp", "mean_logits")


class LinearLogprobOutput(NamedTuple):
    """Row outputs in the labels' shape; a field that was not asked for is None."""

    logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    logsumexp: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logps",),
    scored_rows: int | None = None,
    budget_bytes: int | None = None,
    strategy: str = "auto",
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
    validate: bool = False,
) -> LinearLogprobOutput:
    """Compute per-token log-probs of ``labels`` under the head ``weight`` without building logits.

        z0 = hidden W^T + bias + a_out b^T
        z  = cap(z0 * logit_scale) / temperature,  cap(x) = softcap tanh(x / softcap)
        logps = z_label - logsumexp(z);  entropy = logsumexp(z) - sum_v softmax(z)_v z_v

    The ``[N, V]`` logits are never stored and never rounded: products accumulate in fp32 and the
    softmax statistics are taken from the accumulator. Ignored positions are dropped before any
    product and read 0. Results are bit-for-bit repeatable, and the same row gives the same log-prob
    whatever the strategy, the budget or the rows beside it. ``plan_linear_logprob`` chooses how.
    Under ``torch.compile`` the op is one node of the graph, and there and under CUDA graph capture
    nothing is read on the host: without ``scored_rows`` every row is scored, ignored ones as zeros
    whose results and gradients are 0, and a label outside [0, V) gives NaN; ``group`` and
    ``validate`` are refused. A gradient that arrives at the entropy of a ``direction`` plan costs a
    further pass and its workspace, 64 MiB + (4 + itemsize) NH; force ``resident`` or ``recompute``
    if you use one.

    Args:
        hidden: ``[..., H]`` bf16/fp16/fp32 (fp64 on the torch backend), any strides.
        weight: ``[V, H]``, hidden's dtype (any float dtype under autocast).
        labels: ``[...]`` int64/int32 aligned with hidden (already shifted), in [0, V) or
            ``ignore_index``.
        bias: ``[V]`` or None.
        lora: ``(a_out [..., R], b [V, R])`` adds ``a_out @ b.T`` to the logits, or None.
        temperature, logit_scale: Python floats > 0.
        softcap: Python float > 0 or None.
        outputs: which fields to return: logps, entropy, logsumexp, mean_logits, is_top1 (the first
            maximum wins a tie), log_sum_sq_probs.
        scored_rows: the number of labels that are not ``ignore_index``, when the caller knows it on
            the host; it saves the one host read of the call on a GPU. A wrong number gives NaN.
        budget_bytes: workspace the call may use; default 256 MiB (64 MiB on cpu) + (4 +
            itemsize) N (H + 256) + (4VH if weight needs a gradient), N = scored rows.
        strategy: "auto" (the planner's choice), "score", "direction", "resident" or "recompute".
        backend: "auto" (triton on a CUDA tensor, else torch), "torch" or "triton".
        group: the ranks that share a vocab-parallel head: ``weight``, ``bias`` and ``b`` are this
            rank's rows (any number, in rank order), everything else is the same on every rank.
            Labels, results and V are of the whole head. None: the head is whole.
        validate: check labels on the host even where ``scored_rows`` made that unnecessary.
    Returns:
        ``LinearLogprobOutput``, fp32 fields (bool ``is_top1``) in the labels' shape.
    Gradients: hidden, weight, bias, a_out, b through logps, entropy, logsumexp, mean_logits. Not
        differentiable: labels, is_top1, log_sum_sq_probs; no double backward. With a group the
        upstream gradients have to be the same on every rank; hidden's and a_out's are summed over
        the ranks, one collective each; the forward has two, of three numbers and of row statistics.
    Raises:
        ValueError: shape, range, device or budget.
        TypeError: dtype.
        IndexError: a label outside [0, V).
        RuntimeError: an empty, sharded weight; double backward.
        NotImplementedError: a strategy or backend that cannot.
    Source: the ``direction`` identity d logp / dh = W_y - sum_v p_v W_v is ours; recomputing tiles
        as in Wijmans et al. 2024, arXiv:2411.09009. Differs from it by: logits in fp32, no
        gradient filter, a byte budget.
    """
    compute_dtype = check_head_inputs(_OP, hidden, weight, labels, bias, lora)
    if isinstance(outputs, str) or not outputs:
        fail(_OP, "outputs", "be a non-empty tuple of names", repr(outputs), error=TypeError)
    for name in outputs:
        check_choice(_OP, "outputs", name, OUTPUTS)
    check_choice(_OP, "strategy", strategy, ("auto", *STRATEGIES))
    temperature, logit_scale, softcap = check_transform(_OP, temperature, logit_scale, softcap)
    backend = resolve_backend(_OP, backend, hidden)
    refuse_fp64_on_triton(_OP, backend, {"hidden": compute_dtype})
    in_graph = reads_no_host(labels, scored_rows)
    if in_graph:
        _refuse_in_graph(group, validate)
    shard = None if group is None else vocab_parallel.shard_of(_OP, group, weight, labels)
    lora_a, lora_b = lora if lora is not None else (None, None)
    tensors = (hidden, weight, bias, lora_a, lora_b)
    settings = Settings(
        backend=backend,
        compute_dtype=compute_dtype,
        needs_grad=needed_grads(tensors),
        outputs=frozenset(outputs),
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        strategy=strategy,
        budget_bytes=budget_bytes,
    )
    if in_graph:
        values = score_without_host(_OP, settings, tensors, labels, ignore_index, scored_rows)
        return LinearLogprobOutput(*values)
    rows, row_labels, exact = scored_rows_of(
        _OP, hidden, labels, weight.shape[0], ignore_index, scored_rows, validate, shard
    )
    values = score_rows(planned_call(settings, rows, tensors, shard), tensors, row_labels, rows)
    if exact is not None:
        # a wrong scored_rows must not pass for a result
        values = tuple(
            value if value is None or value.dtype == torch.bool else value.where(exact, torch.nan)
            for value in values
        )
    return LinearLogprobOutput(*values)


def score_rows(
    call: Call,
    tensors: tuple[torch.Tensor | None, ...],
    row_labels: torch.Tensor,
    rows: Rows,
) -> tuple[torch.Tensor | None, ...]:
    """Run a checked and planned call; return the row outputs in the order of ``OUTPUTS``."""
    return _LinearLogprobFunction.apply(*tensors, row_labels, rows, call)


def score_without_host(
    op: str,
    settings: Settings,
    tensors: tuple[torch.Tensor | None, ...],
    labels: torch.Tensor,
    ignore_index: int,
    scored_rows: int | None,
) -> tuple[torch.Tensor | None, ...]:
    """Run a checked call that is traced or captured, where the host has no numbers to read."""
    hidden, weight, bias, lora_a, lora_b = tensors
    found = graph_rows_of(op, hidden, lora_a, labels, weight.shape[0], ignore_index, scored_rows)
    tensors = (found.hidden, weight, bias, found.lora_a, lora_b)
    if torch.compiler.is_compiling():
        values = linear_logprob_in_graph(tensors, found.labels, found.rows, settings)
    else:
        call = planned_call(settings, found.rows, tensors)
        values = score_rows(call, tensors, found.labels, found.rows)
    return tuple(map(found.repaired, values))


def _refuse_in_graph(group: dist.ProcessGroup | None, validate: bool) -> None:
    """Refuse what reads the host or talks to other ranks while a graph is traced or captured."""
    for name, given in (("group", group is not None), ("validate", validate)):
        if given:
            raise NotImplementedError(
                f"{_OP}: {name} must be left out under torch.compile and CUDA graph capture, "
                f"got {'a group' if name == 'group' else validate}. Call it outside the graph."
            )


class _LinearLogprobFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor | None,
        lora_b: torch.Tensor | None,
        labels: torch.Tensor,
        rows: Rows,
        call: Call,
    ):
        # TRL always asks for the entropy and detaches it: no zeros must be made up for it
        ctx.set_materialize_grads(False)
        inputs = Inputs(hidden, weight, bias, lora_a, lora_b, labels)
        # autocast would round the fp32 products of the tiles
        with torch.autocast(hidden.device.type, enabled=False):
            values, kept = backend_of(call.settings.backend).forward(call, rows, inputs)
            if call.shard is not None:
                values, kept = vocab_parallel.combine(call, inputs, values, kept)
        ctx.save_for_backward(*inputs, *kept)
        ctx.call, ctx.rows = call, rows
        out = tuple(
            rows.spread(values[name]) if name in call.settings.outputs else None
            for name in LinearLogprobOutput._fields
        )
        ctx.mark_non_differentiable(
            *(
                value
                for name, value in zip(LinearLogprobOutput._fields, out, strict=True)
                if value is not None and name not in _DIFFERENTIABLE
            )
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None):
        refuse_double_backward(_OP)
        saved = ctx.saved_tensors
        split = len(Inputs._fields)
        inputs, kept = Inputs(*saved[:split]), Kept(*saved[split:])
        call, rows = ctx.call, ctx.rows
        dtype = kept.logsumexp.dtype
        arrived = dict(zip(LinearLogprobOutput._fields, grad_outputs, strict=True))
        grads = RowGrads(
            *(
                None if arrived[name] is None else rows.take_all(arrived[name]).to(dtype)
                for name in RowGrads._fields
            )
        )
        need = frozenset(
            name for name, needed in zip(GRAD_INPUTS, ctx.needs_input_grad, strict=False) if needed
        )
        if all(grad is None for grad in grads) or not need:
            return (None,) * 8
        run = backend_of(call.settings.backend).backward
        if call.shard is not None:
            run = functools.partial(vocab_parallel.backward, run)
        with torch.autocast(inputs.hidden.device.type, enabled=False):
            grad = run(call, rows, inputs, kept, grads, need)
        return (*(grad.get(name) for name in GRAD_INPUTS), None, None, None)
