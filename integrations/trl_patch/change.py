"""One replaced name of TRL, and the handle that keeps all of them and the way back."""

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """One name of TRL to replace: ``make(original)`` returns the replacement."""

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
                "patch_trl: the patch must be on, got an undone one. Call patch_trl() again."
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
        # the owner's own attribute: neither inherited nor bound
        original = vars(owner)[change.name]
        replacement = change.make(original)
        setattr(owner, change.name, replacement)
        self._replaced.append(Replaced(owner, change.name, original, replacement, change.effect))
