"""Inputs for the ``linear_logprob`` tests and one runner for op, eager and fp64 oracle."""

import dataclasses

import torch

from spo_kernels import linear_logprob
from spo_kernels.reference import linear_logprob_reference

ALL_OUTPUTS = (
    "logps",
    "entropy",
    "logsumexp",
    "mean_logits",
    "is_top1",
    "log_sum_sq_probs",
)
DIFFERENTIABLE = ("logps", "entropy", "logsumexp", "mean_logits")
TENSORS = ("hidden", "weight", "bias", "lora_a", "lora_b")


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
