"""The smallest budget of a call, which its refusal of a smaller one names."""

from collections.abc import Callable


def smallest_budget(call: Callable[[int], object]) -> int:
    """Return the least ``budget_bytes`` that ``call`` takes."""
    try:
        call(1)
    except ValueError as error:
        return int(str(error).split("must be at least ")[1].split()[0])
    raise AssertionError("a budget of one byte was enough")
