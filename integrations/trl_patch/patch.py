"""Public ``patch_trl``: TRL's trainers score tokens with ``linear_logprob``, until it is undone."""

from spo_kernels.integrations.trl_patch.change import TRLPatch
from spo_kernels.integrations.trl_version import check_trl

_OP = "patch_trl"
_BACKENDS = ("auto", "torch", "triton")


def patch_trl(
    *, budget_bytes: int | None = None, backend: str = "auto", allow_untested: bool = False
) -> TRLPatch:
    """Let every TRL trainer that scores tokens use ``linear_logprob`` in place of logits.

    DPO, KTO, SFT, GRPO, RLOO and AsyncGRPO keep their fused head with our arithmetic in it, and
    accept a LoRA adapter on the LM head. CPO (SimPO, AlphaPO), ORPO, TPO, Online DPO and A2PO stop
    building ``[N, V]`` logits. Losses and metrics are theirs. Trainers built while the patch is on
    keep working after it is undone. Nothing is patched by an import.

    Args:
        budget_bytes: workspace of one ``linear_logprob`` call, or None for its default.
        backend: "auto", "torch" or "triton", for ``linear_logprob``.
        allow_untested: patch a version of TRL that was not tested too.
    Returns:
        ``TRLPatch``, a context manager with ``report()`` and ``undo()``; while TRL is patched every
        call returns the same one.
    Raises:
        ValueError: range; another setting than the active patch's.
        TypeError: type.
        RuntimeError: an untested TRL.
        ImportError: no TRL.
    """
    _check_settings(budget_bytes, backend)
    if not allow_untested:
        check_trl(_OP, ", or pass allow_untested=True")
    # they import TRL, which must not happen before its version is known to be good
    from spo_kernels.integrations.lm_head.fused_head import FusedHeadSettings
    from spo_kernels.integrations.trl_patch import heads, online, pairs

    patch = heads.active_patch()
    if patch is None:
        patch = TRLPatch(budget_bytes, backend)
        settings = FusedHeadSettings(budget_bytes=budget_bytes, backend=backend)
        patch._install(
            [
                *heads.changes(settings, patch),
                *pairs.changes(settings),
                *online.changes(settings),
            ]
        )
    for name, value in (("budget_bytes", budget_bytes), ("backend", backend)):
        if getattr(patch, name) != value:
            raise ValueError(
                f"{_OP}: {name} must be {getattr(patch, name)!r} while that patch is on, got "
                f"{value!r}. Undo it first."
            )
    patch._calls += 1
    return patch


def _check_settings(budget_bytes: int | None, backend: str) -> None:
    if budget_bytes is not None:
        if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
            raise TypeError(
                f"{_OP}: budget_bytes must be an int or None, got {type(budget_bytes).__name__}"
            )
        if budget_bytes <= 0:
            raise ValueError(f"{_OP}: budget_bytes must be > 0, got {budget_bytes}")
    if backend not in _BACKENDS:
        names = ", ".join(map(repr, _BACKENDS))
        raise ValueError(f"{_OP}: backend must be one of {names}, got {backend!r}")
