"""``warmup``: eager runs and a thrown-away capture, after which a CUDA graph holds a step."""

import pytest
import torch

from spo_kernels import degree_loss, linear_logprob, preference_loss, warmup


def test_errors():
    with pytest.raises(TypeError, match="warmup: step must be a function without arguments, got"):
        warmup(3)
    with pytest.raises(ValueError, match="warmup: rounds must be an int >= 1, got 0"):
        warmup(lambda: None, rounds=0)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls = []
    warmup(lambda: calls.append(1), rounds=3)
    assert calls == [1]


@pytest.mark.gpu
def test_what_a_step_leaves_behind(cuda_device):
    """It runs rounds + 1 times: gradients add up, and hold numbers though a capture has none."""
    hidden = torch.randn(5, 64, device=cuda_device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151, 64, device=cuda_device, dtype=torch.bfloat16)
    labels = torch.randint(151, (5,), device=cuda_device)

    def step():
        linear_logprob(hidden, weight, labels).logps.sum().backward()

    step()
    once, hidden.grad = hidden.grad, None
    warmup(step, rounds=3)
    torch.testing.assert_close(hidden.grad, 4 * once, rtol=2e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=str)
def test_capture(needs, cuda_device):
    """A captured step replays on new data with eager's results, ignored rows and all."""
    H, V, B, T = 64, 1000, 4, 33
    generator = torch.Generator(cuda_device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=cuda_device)

    tensors = {"hidden": randn(B, T, H).bfloat16(), "weight": (randn(V, H) / 8).bfloat16()}
    for name in needs:
        tensors[name].requires_grad_()
    labels = torch.randint(V, (B, T), generator=generator, device=cuda_device)
    labels[:, :5] = -100
    levels = torch.randint(4, (B * T,), generator=generator, device=cuda_device).to(torch.int8)
    offsets = torch.arange(B + 1, device=cuda_device) * T
    head = randn(4, H).requires_grad_()
    leaves = [*(tensors[name] for name in needs), head]

    def step():
        logps = linear_logprob(tensors["hidden"], tensors["weight"], labels).logps
        chosen, rejected = logps.chunk(2)
        loss = preference_loss(chosen, rejected).losses.mean()
        degree = degree_loss(tensors["hidden"].flatten(0, 1), levels, offsets, head).losses.mean()
        loss = loss + 0.1 * degree
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    warmup(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    # another batch: other labels, others of them ignored
    labels.copy_(torch.randint(V, (B, T), generator=generator, device=cuda_device))
    labels[0, 7:] = -100
    with torch.no_grad():
        tensors["hidden"].copy_(randn(B, T, H))
    graph.replay()
    for found, wanted in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
