"""Batches of pairs over a linear head, and the comparison that their tests share."""

import contextlib
import dataclasses
import sys

import pytest
import torch

from spo_kernels import linear_preference_loss
from spo_kernels.calls.loss_table import loss_type_of
from spo_kernels.planner.linear_preference_loss import pair_groups
from spo_kernels.reference.linear_logprob import linear_logprob_reference
from spo_kernels.reference.preference_loss import preference_loss_reference
from tests.helpers.budgets import smallest_budget
from tests.helpers.oracle import assert_within_budget, order_spread

H, V, T = 24, 301, 13
PARAMETERS = ("hidden", "weight", "bias", "lora_a", "lora_b")
# the least budget of a call: groups of the longest pair
SMALLEST = "smallest"
# rows whose exponentials are held: everything, or less than one response has
WHOLE, SPANS = None, 5


def make_batch(names, P, *, dtype=torch.float32, seed=0, tokens=False, orpo=False, lora=False):
    """Tensors of the head's side and of the pairs' side of a call, as two dicts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    rows = [loss_type_of(name) for name in names]
    has_response = any("response" in row.inputs for row in rows) and not orpo
    B = (2 + has_response) * P
    labels = torch.randint(0, V, (B, T), generator=generator)
    prompt = torch.randint(0, T - 2, (B, 1), generator=generator)
    places = torch.arange(T)[None]
    completion = torch.where(places < prompt, -100, labels)
    head = {
        "hidden": normal(B, T, H),
        "weight": normal(V, H, scale=H**-0.5),
        "bias": normal(V),
    }
    if lora:
        head |= {"lora_a": normal(B, T, 3), "lora_b": normal(V, 3, scale=0.3)}
    shape = (B, T) if tokens else (B,)
    pairs = {
        "labels": completion,
        "ref_logps": -6 * torch.rand(shape, generator=generator) * (1 if tokens else T),
        "pair_weights": 0.5 + torch.rand(P, generator=generator),
    }
    if any(row.kind == "ranked" for row in rows):
        del pairs["pair_weights"]
    if any("rewards" in row.inputs for row in rows):
        pairs["reward_chosen"], pairs["reward_rejected"] = torch.randn(2, P, generator=generator)
    if orpo:
        # the prompt counts in the NLL, and padding at the end does not
        wanted = torch.where(places < T - 1, labels[:P], -100)
        pairs["labels"][:, -1] = -100
        pairs["response_labels"] = wanted
    return head, pairs


def reference(head, pairs, *, softcap=None, logit_scale=1.0, temperature=1.0, **mix):
    """The same by full logits and the references of both ops; returns a dict."""
    labels, wanted = pairs["labels"], pairs.get("response_labels")
    ref = pairs.get("ref_logps")
    lora = (head["lora_a"], head["lora_b"]) if "lora_a" in head else None
    options = {"bias": head.get("bias"), "lora": lora, "softcap": softcap}
    options |= {"logit_scale": logit_scale, "temperature": temperature}
    rows = [loss_type_of(name) for name in names_of(mix)]
    blocks = 3 if any("response" in row.inputs for row in rows) and wanted is None else 2
    P = labels.shape[0] // blocks
    logps = linear_logprob_reference(head["hidden"], head["weight"], labels, **options)["logps"]
    sides = dict(zip(("chosen", "rejected", "response"), range(blocks), strict=False))
    given = {}
    for side, i in sides.items():
        part = slice(i * P, (i + 1) * P)
        given[f"{side}_logps"] = logps[part]
        given[f"{side}_mask"] = labels[part] != -100
        if ref is not None:
            given[f"ref_{side}_logps"] = ref[part].to(logps.dtype)
    if wanted is not None:
        chosen = {"hidden": head["hidden"][:P], "weight": head["weight"], "labels": wanted}
        given["response_logps"] = linear_logprob_reference(**chosen, **options)["logps"]
        given["response_mask"] = wanted != -100
    data = {
        name: tensor.to(logps.dtype)
        for name, tensor in pairs.items()
        if name in ("pair_weights", "reward_chosen", "reward_rejected")
    }
    out = preference_loss_reference(**given, **data, **mix)
    return {"loss": out["losses"].sum() / max(P, 1), **out}


@contextlib.contextmanager
def groups_of(rows):
    """Let calls hold the exponentials of ``rows`` rows at a time; yields the pairs streamed."""
    module = sys.modules[linear_preference_loss.__module__]
    plan, streamed = module.plan_pairs, []

    def smaller(*sizes, **question):
        return dataclasses.replace(plan(*sizes, **question), group_rows=rows)

    def counted(*args):
        streamed.extend(g for g in pair_groups(*args) if g.streamed)
        return pair_groups(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan_pairs", smaller)
        patch.setattr(module, "pair_groups", counted)
        yield streamed


def names_of(mix):
    loss_type = mix.get("loss_type", "sigmoid")
    return (loss_type,) if isinstance(loss_type, str) else loss_type


def run(call, head, pairs, *, needs=PARAMETERS, upstream=1.7, device="cpu", **settings):
    """Return outputs and the gradients of ``upstream * loss`` by name."""
    leaves = {
        name: tensor.to(device).clone().requires_grad_(name in needs)
        for name, tensor in head.items()
    }
    pairs = {name: tensor.to(device) for name, tensor in pairs.items()}
    out = call(leaves, pairs, **settings)
    (upstream * out["loss"]).backward()
    out |= {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {name: value.detach() for name, value in out.items()}


def op(head, pairs, **settings):
    """``linear_preference_loss`` with the arguments of :func:`reference`."""
    head, pairs = dict(head), dict(pairs)
    lora = (head.pop("lora_a"), head.pop("lora_b")) if "lora_a" in head else None
    tensors = (head.pop("hidden"), head.pop("weight"), pairs.pop("labels"))
    ref = pairs.pop("ref_logps", None)
    if settings.get("budget_bytes") == SMALLEST:
        settings["budget_bytes"] = smallest_budget(
            lambda budget: linear_preference_loss(
                *tensors, ref, **head, **pairs, lora=lora, **{**settings, "budget_bytes": budget}
            )
        )
    out = linear_preference_loss(*tensors, ref, **head, **pairs, lora=lora, **settings)
    return out._asdict()


def compare(
    backend, head, pairs, *, strategy, budget_bytes=None, group_rows=None, needs=PARAMETERS, **mix
):
    """Hold every output and gradient of ``backend`` to the budget; ``group_rows`` streams pairs."""
    name, device = backend
    doubles = {n: t.double() for n, t in head.items()}
    wide = {n: t.double() if t.is_floating_point() else t for n, t in pairs.items()}
    needs = tuple(n for n in needs if n in head)
    oracle = run(reference, doubles, wide, needs=needs, **mix)
    eager = run(reference, head, pairs, needs=needs, **mix)
    settings = {"strategy": strategy, "budget_bytes": budget_bytes, "backend": name}
    if group_rows is None:
        actual = run(op, head, pairs, needs=needs, device=device, **mix, **settings)
    else:
        with groups_of(group_rows) as streamed:
            actual = run(op, head, pairs, needs=needs, device=device, **mix, **settings)
        assert streamed
    assert set(actual) == set(oracle)
    terms = max(*head["hidden"].shape, *head["weight"].shape)
    for field, value in actual.items():

        def spread(field=field):
            def output_of(moved):
                return run(reference, moved, wide, needs=needs, **mix)[field]

            return order_spread(output_of, head, terms)

        label = f"linear_preference_loss[{name}, {strategy}].{field} {names_of(mix)}"
        values = value.cpu(), eager[field].to(value.dtype), oracle[field]
        assert_within_budget(label, *values, spread)
    return actual
