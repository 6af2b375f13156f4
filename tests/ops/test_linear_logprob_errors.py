"""``linear_logprob``: every mistake of a caller is one sentence, before anything is allocated."""

import pytest
import torch

from spo_kernels import linear_logprob
from tests.helpers.range_cases import ends_of


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"weight": torch.zeros(9, 7)},
            ValueError,
            r"weight must have shape \[V, H\] with H=8, got",
        ),
        (
            {"weight": torch.zeros(0, 8)},
            RuntimeError,
            "weight must hold .*, got 0 elements .*ZeRO-3",
        ),
        (
            {"weight": torch.zeros(9, 8).half()},
            TypeError,
            "weight must have hidden's dtype float32",
        ),
        (
            {"hidden": torch.zeros(4, 8).int()},
            TypeError,
            "hidden must have dtype bfloat16, float16",
        ),
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor, got list"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must have dtype int64, int32, got float32"),
        (
            {"labels": torch.zeros(5).long()},
            ValueError,
            r"labels must have shape \(4,\), got \(5,\)",
        ),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \[V\] with V=9, got \(8,\)"),
        ({"lora": torch.zeros(3)}, TypeError, r"lora must be a pair \(a_out, b\), got Tensor"),
        (
            {"lora": (torch.zeros(4, 2), torch.zeros(9, 3))},
            ValueError,
            r"lora a_out must have shape \(4, 3\), got \(4, 2\)",
        ),
        *(
            ({name: value}, ValueError, f"{name} must be a finite float > 0, got {value}$")
            for name in ("temperature", "logit_scale", "softcap")
            for value in ends_of("(0, inf)")[0]
        ),
        ({"softcap": torch.ones(())}, TypeError, "softcap must be a Python float > 0, got Tensor"),
        ({"outputs": ("probs",)}, ValueError, "outputs must be one of 'entropy', .*got 'probs'"),
        ({"outputs": "logps"}, TypeError, "outputs must be a non-empty tuple of names"),
        ({"strategy": "fast"}, ValueError, "strategy must be one of .*, got 'fast'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of .*, got 'cuda'"),
        ({"scored_rows": 9}, ValueError, "scored_rows must be between 0 and 4, got 9"),
        (
            {"scored_rows": 3},
            ValueError,
            "scored_rows must be the number of scored labels, 4, got 3",
        ),
        ({"budget_bytes": 10}, ValueError, "budget_bytes must be at least [0-9]+"),
        (
            {"weight": torch.zeros(9, 8, device="meta")},
            ValueError,
            "weight must be on cpu like hidden",
        ),
    ],
)
def test_errors(changes, error, text):
    """Each mistake is one sentence that names argument, requirement and value."""
    arguments = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(9, 8),
        "labels": torch.zeros(4, dtype=torch.int64),
        **changes,
    }
    with pytest.raises(error, match=text):
        linear_logprob(**arguments)


def test_backend_errors(monkeypatch):
    """A CPU tensor into triton, fp64 into triton, a strategy that cannot give a gradient."""
    hidden = torch.zeros(4, 8, requires_grad=True)
    weight, labels = torch.zeros(9, 8, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="strategy='direction' cannot give the gradients"):
        linear_logprob(hidden, weight, labels, strategy="direction")
    with pytest.raises(TypeError, match="on backend='triton', got float64. Use backend='torch'"):
        linear_logprob(hidden.double(), weight.double(), labels, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA tensor, got cpu"):
        linear_logprob(hidden, weight, labels, backend="triton")
