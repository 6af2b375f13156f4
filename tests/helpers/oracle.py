"""The one tolerance of every test: an op may be at most twice as wrong as eager torch."""

from collections.abc import Callable, Mapping

import torch

Tensors = Mapping[str, torch.Tensor | None]


def assert_within_budget(
    op_name: str,
    actual: torch.Tensor,
    eager: torch.Tensor,
    oracle: torch.Tensor,
    spread: Callable[[], float] | None = None,
) -> None:
    """Require ``err(actual) <= 2 err(eager) + 2 eps(actual.dtype) max|oracle|``, max over elements.

    ``eager`` is the reference in the op's own input dtype, ``oracle`` the reference in fp64 on the
    same rounded inputs. Eager's error is one draw: another order of its sums, which a BLAS chooses
    by processor and shape, may have several times as much. ``spread`` returns how far the order
    can take this output, see ``order_spread``; it is added, and called only where the rest is not
    enough. A NaN or an infinity never passes.
    """
    assert actual.shape == oracle.shape, f"{op_name}: shape {actual.shape}, not {oracle.shape}"
    if actual.numel() == 0:
        return
    actual_error = (actual.detach().cpu().double() - oracle.detach().cpu()).abs()
    eager_error = (eager.detach().cpu().double() - oracle.detach().cpu()).abs()
    # an overflow of eager's is no licence
    eager_error = torch.nan_to_num(eager_error, nan=0.0, posinf=0.0)
    eps = torch.finfo(actual.dtype).eps
    budget = float(2.0 * eager_error.max() + 2.0 * eps * oracle.detach().abs().max())
    worst = int(torch.nan_to_num(actual_error, nan=float("inf")).argmax())
    error = float(actual_error.flatten()[worst])
    if spread is not None and error > budget:
        budget += spread()
    values = [float(t.detach().flatten()[worst]) for t in (actual, eager, oracle)]
    assert error <= budget, (
        f"{op_name} {tuple(actual.shape)}: error {error:.3e} over budget {budget:.3e} at flat "
        f"index {worst}: actual {values[0]}, eager {values[1]}, oracle {values[2]}"
    )


def moved_by_order(tensors: Tensors, terms: int, seed: int) -> dict[str, torch.Tensor | None]:
    """Return ``tensors`` in fp64, each element moved by what the order of fp32 sums can do.

    A sum of ``terms`` products, added in fp32 in any order, is the exact sum of factors moved by a
    relative ``terms u`` at most (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), and
    by ``sqrt(terms) u`` where the roundings are independent (Higham and Mary 2019): that is the
    move, up or down at random.
    """
    generator = torch.Generator().manual_seed(seed)
    size = terms**0.5 * torch.finfo(torch.float32).eps / 2

    def move(tensor):
        sign = 2 * torch.randint(2, tensor.shape, generator=generator) - 1
        return tensor.detach().double() * (1 + size * sign.to(tensor.device))

    return {
        name: move(tensor) if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def order_spread(
    output_of: Callable[[dict], torch.Tensor], tensors: Tensors, terms: int, draws: int = 4
) -> float:
    """Return how far the fp64 output strays, at most, when ``moved_by_order`` moves the inputs."""
    still = output_of(moved_by_order(tensors, 0, 0)).detach()
    moved = (output_of(moved_by_order(tensors, terms, seed)).detach() for seed in range(draws))
    return max(float((value - still).abs().nan_to_num(nan=0.0).max()) for value in moved)
