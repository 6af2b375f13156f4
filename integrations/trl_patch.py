"""Public ``patch_trl``: TRL's trainers score tokens with ``linear_logprob``, until it is undone."""

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .trl_version import check_trl

_OP = "patch_trl"
_BACKENDS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Change:
    """One name of TRL to replace: ``make`` gets what it holds and returns what it shall hold."""

    owner: str  # a module, or "module:Class"
    name: str
    effect: str
    make: Callable[[Any], Any]


@dataclass(frozen=True)
class Replaced:
    """A change that was made; ``original`` is the very object that ``undo`` puts back."""

    owner: types.ModuleType | type
    name: str
    original: Any
    replacement: Any
    effect: str

    @property
    def dotted(self) -> str:
        if isinstance(self.owner, type):
            return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"
        return f"{self.owner.__name__}.{self.name}"


class TRLPatch:
    """The names of TRL that ``patch_trl`` replaced, and the way back.

    As a context manager it restores them at the end of the outermost ``with`` block; once undone
    it is of no more use.
    """

    def __init__(self, budget_bytes: int | None, backend: str) -> None:
        self.budget_bytes = budget_bytes
        self.backend = backend
        self._calls = 0
        self._blocks = 0
        self._replaced: list[Replaced] = []
        self._skipped: dict[str, str] = {}

    @property
    def active(self) -> bool:
        """Whether TRL is patched by this handle now."""
        return bool(self._replaced)

    @property
    def skipped(self) -> dict[str, str]:
        """Modules that cannot be imported here, and so are not patched, with the reason."""
        return dict(self._skipped)

    def report(self) -> dict[str, str]:
        """Return the dotted name of everything that is replaced now, and what that does."""
        return {replaced.dotted: replaced.effect for replaced in self._replaced}

    def undo(self) -> None:
        """Put every original object back, however often ``patch_trl`` was called."""
        self._calls = 0
        while self._replaced:
            replaced = self._replaced.pop()
            setattr(replaced.owner, replaced.name, replaced.original)

    def __enter__(self) -> "TRLPatch":
        if not self.active:
            raise RuntimeError(
                f"{_OP}: the patch must be on, got an undone one. Call {_OP}() again."
            )
        self._blocks += 1
        return self

    def __exit__(self, *_: Any) -> None:
        self._blocks -= 1
        self._calls -= 1
        if self._blocks == 0 and self._calls <= 0:
            self.undo()

    def __repr__(self) -> str:
        return f"TRLPatch({', '.join(self.report()) or 'undone'})"

    def _install(self, changes: list[Change]) -> None:
        try:
            for change in changes:
                self._replace(change)
        except BaseException:
            # half a patch would train some trainers with one arithmetic and some with another
            self.undo()
            raise

    def _replace(self, change: Change) -> None:
        module, _, attribute = change.owner.partition(":")
        try:
            owner = importlib.import_module(module)
        except ImportError as error:
            self._skipped[module] = str(error)
            return
        if attribute:
            owner = getattr(owner, attribute)
        # what the owner itself holds: neither inherited nor bound
        original = vars(owner)[change.name]
        replacement = change.make(original)
        setattr(owner, change.name, replacement)
        self._replaced.append(Replaced(owner, change.name, original, replacement, change.effect))


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
    Raises: ValueError (range, another setting than the active patch's), TypeError (type),
        RuntimeError (an untested TRL), ImportError (no TRL).
    """
    _check_settings(budget_bytes, backend)
    if not allow_untested:
        check_trl(_OP, ", or pass allow_untested=True")
    # they import TRL, which must not happen before its version is known to be good
    from . import trl_patch_heads, trl_patch_online, trl_patch_pairs
    from .fused_head import FusedHeadSettings

    patch = trl_patch_heads.active_patch()
    if patch is None:
        patch = TRLPatch(budget_bytes, backend)
        settings = FusedHeadSettings(budget_bytes=budget_bytes, backend=backend)
        patch._install(
            [
                *trl_patch_heads.changes(settings, patch),
                *trl_patch_pairs.changes(settings),
                *trl_patch_online.changes(settings),
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
