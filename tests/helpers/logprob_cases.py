"""Inputs for the ``linear_logprob`` tests and one runner for op, eager and fp64 oracle."""

import dataclasses
from collections.abc import Callable

import torch

from spo_kernels import linear_logprob
from spo_kernels.reference.linear_logprob import linear_logprob_reference
from tests.helpers.oracle import assert_within_budget, order_spread

ALL_OUTPUTS = (
    "logps",
    "entropy",
    "logsumexp",
    "mean_logits",
    "is_top1",
    "log_sum_sq_probs",
)
DIFFERENTIABLE = ("logps", "entropy", "logsumexp", "mean_logits")
# strategy, inputs that need a gradient
STRATEGIES = [
    ("score", ()),
    ("direction", ("hidden",)),
    ("direction", ("hidden", "lora_a")),
    ("resident", ("hidden", "weight", "bias", "lora_a", "lora_b")),
    ("recompute", ("hidden", "weight", "bias", "lora_a", "lora_b")),
]
TRANSFORMS = [
    {},
    {"logit_scale": 0.7, "temperature": 1.3},
    {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3},
]


@dataclasses.dataclass
class Case:
    """One problem: tensors in the op's dtype, labels, options and upstream gradients."""

    tensors: dict[str, torch.Tensor | None]
    labels: torch.Tensor
    options: dict[str, float | None]
    upstream: dict[str, torch.Tensor]

    def evaluate(self, how: str, needs: tuple[str, ...], **settings):
        """Return (outputs, gradients) of "op", "eager" (same dtype) or "oracle" (fp64)."""
        dtype = torch.float64 if how == "oracle" else None
        leaves = {
            name: None
            if tensor is None
            else tensor.detach().clone().to(dtype).requires_grad_(name in needs)
            for name, tensor in self.tensors.items()
        }
        lora = None if leaves["lora_b"] is None else (leaves["lora_a"], leaves["lora_b"])
        arguments = (leaves["hidden"], leaves["weight"], self.labels)
        options = {"bias": leaves["bias"], "lora": lora, **self.options}
        if how == "op":
            out = linear_logprob(*arguments, **options, **settings)._asdict()
        else:
            out = linear_logprob_reference(*arguments, **options)
        if needs:
            total = sum(
                (out[name] * grad.to(out[name].dtype)).sum() for name, grad in self.upstream.items()
            )
            total.backward()
        return out, {name: leaves[name].grad for name in needs}


def make_case(
    *,
    rows: int,
    H: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = False,
    lora: bool = False,
    softcap: float | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    ignored: float = 0.25,
    peaked: bool = False,
    upstream: tuple[str, ...] = ("logps",),
    seed: int = 0,
) -> Case:
    """Random inputs; ``peaked`` draws the labels from a softmax with logits of deviation ~5.7."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    hidden = normal(rows, H)
    weight = normal(V, H, scale=(5.7 if peaked else 1.0) * H**-0.5)
    labels = torch.randint(0, V, (rows,), generator=generator)
    if peaked and rows:
        labels = torch.multinomial((hidden @ weight.T).softmax(-1), 1, generator=generator)[:, 0]
    labels = labels.masked_fill(torch.rand(rows, generator=generator) < ignored, -100)
    tensors = {
        "hidden": hidden,
        "weight": weight,
        "bias": normal(V) if bias else None,
        "lora_a": normal(rows, 5) if lora else None,
        "lora_b": normal(V, 5, scale=0.3) if lora else None,
    }
    return Case(
        tensors={k: None if v is None else v.to(dtype).to(device) for k, v in tensors.items()},
        labels=labels.to(device),
        options={"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap},
        upstream={name: normal(rows).to(device) for name in upstream},
    )


def relative_norm(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """Return ``|actual - oracle| / |oracle|``."""
    difference = (actual.double() - oracle.double()).norm()
    return float(difference / oracle.double().norm().clamp(min=1e-300))


def compare(case, needs, *, outputs=ALL_OUTPUTS, name="linear_logprob", **run):
    out, grads = case.evaluate("op", needs, outputs=outputs, **run)
    eager, eager_grads = case.evaluate("eager", needs)
    oracle, oracle_grads = case.evaluate("oracle", needs)
    for key in outputs:
        if key == "is_top1":
            assert torch.equal(out[key], oracle[key]), f"{name}: is_top1"
        else:
            # the outputs are fp32 whatever the inputs are, so eager's own fp32 sets the bar
            reference = case_in_float(case).evaluate("eager", ())[0][key]
            spread = spread_of(case, (), key)
            assert_within_budget(f"{name} {key}", out[key], reference, oracle[key], spread)
    for key in needs:
        assert grads[key].dtype == case.tensors[key].dtype
        values = grads[key], eager_grads[key], oracle_grads[key]
        assert_within_budget(f"{name} grad_{key}", *values, spread_of(case, needs, key))


def spread_of(case: Case, needs: tuple[str, ...], key: str) -> Callable[[], float]:
    """How far the order of the sums takes the gradient of ``key``, or without needs that output."""

    def output_of(moved):
        out, grads = dataclasses.replace(case, tensors=moved).evaluate("oracle", needs)
        return grads[key] if needs else out[key]

    # logits sum over H, probabilities and gradients over V, the head's gradient over the rows
    terms = max(*case.tensors["hidden"].shape, *case.tensors["weight"].shape)
    return lambda: order_spread(output_of, case.tensors, terms)


def case_in_float(case):
    tensors = {k: None if v is None else v.float() for k, v in case.tensors.items()}
    return type(case)(tensors, case.labels, case.options, case.upstream)
