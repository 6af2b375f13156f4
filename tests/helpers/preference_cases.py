"""Pairs, mixes and the comparison that the tests of ``preference_loss`` share."""

import torch

from spo_kernels import preference_loss
from spo_kernels.calls.loss_table import LOSS_TYPE_NAMES, LOSS_TYPES, loss_type_of
from spo_kernels.reference.preference_loss import preference_loss_reference
from tests.helpers.oracle import assert_within_budget, order_spread

BLOCK_P = 128
MIXES = [
    *((name,) for name in LOSS_TYPE_NAMES),
    # what a kernel may hold at once: every type that takes a pair's weight, and ranks
    tuple(row.name for row in LOSS_TYPES if row.kind != "ranked"),
    ("aot", "sft", "aot_unpaired", "aql", "sigmoid"),
]
# parameters away from their defaults, where a default switches a term off
OPTIONS = {"label_smoothing": 0.1, "alphapo_alpha": 0.25}


def rows_of(names):
    return [loss_type_of(name) for name in names]


def make_case(names, P, *, form="sums", dtype=torch.float32, seed=0, extras=False, scale=60.0):
    """Log-probs of P pairs and what the types of a mix need, as two dicts of tensors.

    ``extras`` adds every optional input the mix allows: weights of pairs, rewards, WPO's squares,
    and for tokens ``ld_alpha``.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = rows_of(names)
    T = 11 if form == "rows" else 3 * P + 4

    def logps(scale):
        if form == "sums":
            return -scale * torch.rand(P, generator=generator)
        shape = (P, T) if form == "rows" else (1, T)
        return -scale / 10 * torch.rand(shape, generator=generator)

    tensors, inputs = {}, {}
    needs_response = any("response" in row.inputs for row in rows)
    sides = ("chosen", "rejected", "response") if needs_response else ("chosen", "rejected")
    for side in sides:
        tensors[f"{side}_logps"] = logps(scale).to(dtype)
        tensors[f"ref_{side}_logps"] = logps(scale).to(dtype)
        if form == "sums":
            inputs[f"{side}_lengths"] = torch.randint(0, 60, (P,), generator=generator)
            continue
        shape = tensors[f"{side}_logps"].shape
        inputs[f"{side}_mask"] = torch.rand(shape, generator=generator) < 0.7
        if form == "offsets":
            cuts = torch.randint(0, T + 1, (P + 1,), generator=generator)
            inputs[f"{side}_offsets"] = cuts.sort().values
    if extras or any("rewards" in row.inputs for row in rows):
        for side in ("chosen", "rejected"):
            inputs[f"reward_{side}"] = torch.randn(P, generator=generator)
    if extras and not any(row.kind == "ranked" for row in rows):
        # few pairs that count nothing: over one or two, eager's error is luck
        inputs["pair_weights"] = 0.5 + torch.rand(P, generator=generator)
        inputs["pair_weights"][1::7] = 0.0
        inputs["min_reward_margin"] = 0.3
        for side in ("chosen", "rejected"):
            inputs[f"{side}_log_sum_sq_probs"] = logps(2.0)
    if extras and form != "sums":
        inputs["ld_alpha"] = 0.4
    return tensors, inputs


def leaves_of(tensors, device="cpu"):
    return {
        name: t.to(device).clone().requires_grad_(not name.startswith("ref"))
        for name, t in tensors.items()
    }


def run(call, tensors, upstream, device="cpu", **settings):
    """Return the outputs and the policy's gradients under ``upstream``, by name."""
    leaves = leaves_of(tensors, device)
    settings = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    out = call(**leaves, **settings)
    out = out if isinstance(out, dict) else out._asdict()
    out["losses"].backward(upstream.to(out["losses"].device, out["losses"].dtype))
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            # nothing of the mix may depend on this response
            out[f"grad_{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return out


def compare(backend, tensors, upstream, **settings):
    """Hold every output and gradient of ``backend`` to the budget."""
    name, device = backend
    doubles = {n: t.double() for n, t in tensors.items()}
    oracle = run(preference_loss_reference, doubles, upstream.double(), **settings)
    eager = run(preference_loss_reference, tensors, upstream, **settings)
    actual = run(preference_loss, tensors, upstream, device, **settings, backend=name)
    assert set(actual) == set(oracle)
    # tokens that are summed to a score; a sum that is given moves by its own rounding
    terms = max(t.shape[-1] if t.dim() == 2 else 1 for t in tensors.values())
    for field, value in actual.items():

        def spread(field=field):
            def output_of(moved):
                return run(preference_loss_reference, moved, upstream.double(), **settings)[field]

            return order_spread(output_of, tensors, terms)

        label = f"preference_loss[{name}].{field} {settings.get('loss_type')}"
        assert_within_budget(label, value.cpu(), eager[field], oracle[field], spread)
    return actual
