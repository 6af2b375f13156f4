"""Refuses a TRL that the adapters were not tested with, before anything of it is imported."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

TESTED = ("1.16", "1.17")


def check_trl(op: str = "spo_kernels.integrations", way_out: str = "") -> None:
    """Raise ImportError without TRL, RuntimeError with an untested version of it."""
    low, high = TESTED
    install = f"pip install 'trl>={low},<{high}'"
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(f"{op}: trl is not installed. {install}") from None
    # a pre-release of the upper bound is above the tested range too
    if not Version(low) <= Version(found) < Version(f"{high}.dev0"):
        raise RuntimeError(
            f"{op}: trl must be >= {low} and < {high}, got {found}. {install}{way_out}"
        )
