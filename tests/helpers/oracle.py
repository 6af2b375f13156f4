"""The one tolerance of every test: an op may be at most twice as wrong as eager torch."""

import torch


def assert_within_budget(
    op_name: str, actual: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor
) -> None:
    """Require ``err(actual) <= 2 err(eager) + 2 eps(actual.dtype) max|oracle|``, max over elements.

    ``eager`` is the reference in the op's own input dtype, ``oracle`` the reference in fp64 on the
    same rounded inputs. A NaN or an infinity never passes.
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
    values = [float(t.detach().flatten()[worst]) for t in (actual, eager, oracle)]
    assert error <= budget, (
        f"{op_name} {tuple(actual.shape)}: error {error:.3e} over budget {budget:.3e} at flat "
        f"index {worst}: actual {values[0]}, eager {values[1]}, oracle {values[2]}"
    )
