"""What runs under compute-sanitizer launches every kernel, and says what keeps it from running."""

import importlib
import pkgutil
import subprocess

import pytest

from benchmarks import sanitize
from spo_kernels.calls.backends import triton_interpreter_on

pytest.importorskip("triton")


@pytest.mark.slow
def test_launches_every_kernel(monkeypatch):
    if not triton_interpreter_on():
        pytest.skip("needs the interpreter (make test runs it so)")
    from triton.runtime.interpreter import InterpretedFunction

    from spo_kernels import kernels

    launched, run = set(), InterpretedFunction.run

    def recorded(self, *args, **settings):
        launched.add(self.fn.__name__)
        return run(self, *args, **settings)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    names = list(sanitize.launches("cpu"))
    written = {
        name
        for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if isinstance(value, InterpretedFunction) and name.endswith("_kernel")
    }
    assert names and len(written) > 10
    assert launched == written


def done(code: int, *lines: str):
    return lambda *args, **settings: subprocess.CompletedProcess(args, code, "\n".join(lines))


def test_left_out_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sanitize.shutil, "which", lambda *args, **settings: None)
    assert sanitize.main([]) == 0
    assert "left out: it is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "line", "status", "printed"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", 0, "memcheck: nothing found"),
        (99, "========= Invalid __global__ read", 1, "memcheck: something found"),
        (1, "========= Error: Device not supported", 0, "memcheck left out: ===="),
        (1, "RuntimeError: Unable to, of ours", 1, "RuntimeError: Unable to, of ours"),
    ],
)
def test_verdicts(monkeypatch, capsys, code, line, status, printed):
    """Only a tool that cannot run here is left out; an error, of ours or found, is one."""
    monkeypatch.setattr(sanitize, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(
        sanitize.subprocess,
        "run",
        lambda command, **settings: (
            done(code, line) if command[0] == "compute-sanitizer" else done(0)
        )(),
    )
    assert sanitize.main([]) == status
    assert printed in capsys.readouterr().out
