"""The package as a whole: layering, imports on a bare machine, security promises, wheel, make."""

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import spo_kernels
from tests.helpers.processes import ROOT, run_python

CORE = sorted((ROOT / "spo_kernels").rglob("*.py"))
INTEGRATIONS = sorted((ROOT / "integrations").rglob("*.py"))
OWN = CORE + INTEGRATIONS

# a folder imports itself and folders of lower layers; a backend imports no other backend. The name
# of a module directly in the package stands for itself, "" for the package
LAYERS = (
    {"calls", "reference"},
    {"planner", "data"},
    {"torch_backend", "kernels"},
    {"ops"},
    {""},
    {"tune"},
    {"cli"},
)
ADAPTED = {"accelerate", "datasets", "peft", "tokenizers", "transformers", "trl"}


def name_of(path: Path) -> str:
    """Return a module's name inside the package: "" for the package, "kernels.tiles", ..."""
    parts = path.relative_to(ROOT / "spo_kernels").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def folder_of(module: str) -> str:
    return module.partition(".")[0]


def layer_of(folder: str) -> int:
    for layer, folders in enumerate(LAYERS):
        if folder in folders:
            return layer
    raise AssertionError(f"spo_kernels/{folder} has no layer: add it to LAYERS in this test")


def imports_of(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the absolute dotted name of everything a file imports, with its statement."""
    package = ["spo_kernels", *name_of(path).split(".")[:-1]] if path in CORE else []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, node.module] if node.module else base)
            for alias in node.names:
                yield f"{start}.{alias.name}", node


def own_modules(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the modules of the package that a file imports, by their name inside it."""
    known = {name_of(file) for file in CORE}
    for name, node in imports_of(path):
        if name.split(".")[0] == "spo_kernels":
            inside = name.partition(".")[2]
            while inside not in known:
                inside = inside.rpartition(".")[0]
            yield inside, node


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def fault_of(folder: str, used: str, node: ast.stmt) -> str:
    """Return what is wrong with an import across folders, or nothing."""
    if layer_of(used) >= layer_of(folder):
        return "not a lower layer"
    if folder == "data" and used != "calls":
        return "data needs no op"
    if "reference" in (folder, used):
        return "the oracle sees nothing of ours, and nothing of ours sees the oracle"
    if folder == "ops" and used == "kernels" and node.col_offset == 0:
        return "outside the dispatching function"
    return ""


def test_layering() -> None:
    wrong = []
    for path in CORE:
        folder = folder_of(name_of(path))
        for module, node in own_modules(path):
            used = folder_of(module)
            if used != folder and (fault := fault_of(folder, used, node)):
                wrong.append(f"{where(path, node)} imports spo_kernels.{module}: {fault}")
    assert not wrong, "\n".join(wrong)


def test_modules_directly_in_the_package() -> None:
    names = {path.stem for path in (ROOT / "spo_kernels").glob("*.py")}
    assert names == {"__init__", "cli", "tune"}, "a new module belongs into a folder"


def test_same_file_names_for_the_same_op() -> None:
    """``find -name 'degree_loss*'`` shows one op whole."""
    folders = ("ops", "torch_backend", "kernels", "reference")
    ops = {path.stem for path in (ROOT / "spo_kernels" / "reference").glob("*.py")} - {"__init__"}
    assert "degree_loss" in ops
    for op in ops:
        for folder in folders:
            assert (ROOT / "spo_kernels" / folder / f"{op}.py").is_file(), (folder, op)
        assert list((ROOT / "tests" / "ops").glob(f"test_{op}*.py")), op


def test_no_test_imports_a_test() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for name, node in imports_of(path):
            is_test = name.startswith("tests.") and any(
                part.startswith("test_") for part in name.split(".")[:3]
            )
            assert not is_test, f"{where(path, node)}: what tests share is in tests/helpers"


@pytest.mark.parametrize("package", ["spo_kernels", "spo_kernels.integrations"])
def test_type_checkers_see_the_public_names(package) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(inspect.getsource(module))
    seen = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(package):
            seen |= {alias.name: node.module.removeprefix(f"{package}.") for alias in node.names}
    assert seen == module._MODULE_OF


def test_third_party_imports_stay_in_their_folder() -> None:
    wrong = []
    for path in CORE:
        for name, node in imports_of(path):
            top = name.split(".")[0]
            if top in ADAPTED or (top == "triton" and path.parent.name != "kernels"):
                wrong.append(f"{where(path, node)} imports {top}")
    assert not wrong, "\n".join(wrong)


def test_integrations_use_public_names_only() -> None:
    public = {f"spo_kernels.{name}" for name in spo_kernels.__all__}
    wrong = []
    for path in INTEGRATIONS:
        for name, node in imports_of(path):
            is_core = name.startswith("spo_kernels.")
            if is_core and not name.startswith("spo_kernels.integrations") and name not in public:
                wrong.append(f"{where(path, node)} imports {name}, which is not public")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_integrations_folder_by_path() -> None:
    """From the root it would be a second module with different classes."""
    for path in (
        OWN + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))
    ):
        for name, node in imports_of(path):
            assert name.split(".")[0] != "integrations", where(path, node)


def test_public_signatures() -> None:
    assert set(spo_kernels.__all__) <= set(dir(spo_kernels))
    for name in filter(lambda name: callable(getattr(spo_kernels, name)), spo_kernels.__all__):
        parameters = inspect.signature(getattr(spo_kernels, name)).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{name} takes **kwargs"


def test_security_scan() -> None:
    """No network, pickle, eval, remote code, environment read of our own."""
    forbidden_modules = {
        "dill",
        "ftplib",
        "http",
        "httpx",
        "marshal",
        "pickle",
        "requests",
        "shelve",
    }
    forbidden_modules |= {"socket", "telnetlib", "urllib", "urllib3", "webbrowser"}
    forbidden_calls = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    forbidden_calls |= {"torch.load", "torch.save", "torch.hub.load"}
    for path in OWN:
        for name, node in imports_of(path):
            assert name.split(".")[0] not in forbidden_modules, f"{where(path, node)} {name}"
            # the ahead-of-time report runs the disassembler that triton ships
            if name.split(".")[0] == "subprocess":
                assert path.name == "aot.py", f"{where(path, node)} {name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in forbidden_calls, where(path, node)
                for keyword in node.keywords:
                    trusting = keyword.arg == "trust_remote_code" and (
                        isinstance(keyword.value, ast.Constant) and keyword.value.value
                    )
                    assert not trusting, where(path, node)
            for key in environment_reads(node):
                assert key.startswith("TRITON_"), f"{where(path, node)} reads {key}"


def environment_reads(node: ast.AST) -> Iterator[str]:
    """Yield the names of environment variables that an expression reads."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in {"os.environ.get", "os.getenv"}:
        yield ast.unparse(node.args[0]).strip("'\"")
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        if ast.unparse(node.value) == "os.environ":
            yield ast.unparse(node.slice).strip("'\"")


def test_cold_import_without_triton_and_trl() -> None:
    """Imports, plans and computes on a machine with neither, and without a GPU."""
    run_python(
        """
import sys

for name in ("triton", "trl", "transformers", "datasets", "peft", "rich"):
    # python's own way to say that a module is not installed
    sys.modules[name] = None
import spo_kernels
assert "torch" not in sys.modules, "import spo_kernels must not wait for torch"
for name in spo_kernels.__all__:
    getattr(spo_kernels, name)

import torch
hidden = torch.randn(3, 8, requires_grad=True)
out = spo_kernels.linear_logprob(hidden, torch.randn(11, 8), torch.tensor([1, 2, 10]))
out.logps.sum().backward()
assert hidden.grad.isfinite().all()
loss = spo_kernels.preference_loss(torch.randn(2), torch.randn(2), torch.randn(2), torch.randn(2))
assert loss.losses.shape == (2,)
from spo_kernels.cli import main
assert main(["doctor"]) == 0
""",
        CUDA_VISIBLE_DEVICES="",
    )


def test_import_touches_nothing() -> None:
    """An import opens no socket, runs and writes nothing, patches nothing.

    What we build on is imported before the trap is set; the trap sees our own modules only.
    """
    run_python(
        """
import importlib, pkgutil, sys
sys.dont_write_bytecode = True
import torch, triton, triton.language, triton.tools.tensor_descriptor
import transformers, trl, datasets, peft, accelerate, rich.table, rich.progress, rich.console
import matplotlib.pyplot, RAKE, safetensors.torch, yaml, torch.profiler
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser
from trl.trainer import dpo_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PrinterCallback

TRAPPED = {"socket.connect", "socket.bind", "subprocess.Popen", "os.system", "os.exec", "os.remove"}
caught = []

def trap(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
    if event in TRAPPED or writes:
        caught.append((event, arguments))

sys.addaudithook(trap)
before = {name: vars(module).copy() for name, module in (("trainer", trl.DPOTrainer),)}
import spo_kernels, spo_kernels.integrations
seen = 0
for package in (spo_kernels, spo_kernels.integrations):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        seen += 1
assert seen > 10, seen
assert not caught, caught
assert before["trainer"] == dict(vars(trl.DPOTrainer)), "an import patched TRL"
"""
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # built from a copy, since setuptools leaves build folders in its source
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("spo_kernels", "integrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(target), str(source)], check=True)
    return next(target.glob("spo_kernels-*.whl"))


def test_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in CORE:
        assert str(path.relative_to(ROOT)) in names
    for path in INTEGRATIONS:
        assert f"spo_kernels/integrations/{path.relative_to(ROOT / 'integrations')}" in names
    assert {"spo_kernels/py.typed", "spo_kernels/integrations/command/demo_pairs.jsonl"} <= names
    for path in (ROOT / "integrations" / "accelerate_configs").glob("*.yaml"):
        assert f"spo_kernels/integrations/accelerate_configs/{path.name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("integrations/", "tests/", "benchmarks/")) for name in names)


def test_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import spo_kernels, spo_kernels.integrations
print(spo_kernels.__file__, spo_kernels.integrations.__file__, sep="\\n")
"""
    for line in run_python(code, PYTHONPATH=str(tmp_path)).split():
        assert Path(line).is_relative_to(tmp_path)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_without_a_gpu() -> None:
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode != 0
    assert "make gpu needs an NVIDIA GPU" in done.stderr


def test_faults_name_tests_that_exist() -> None:
    """Each row of the table in tests/README.md is held by a test, by its path and name."""
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    _, table = text.split("| what goes wrong | what must happen | held by |\n|---|---|---|\n")
    rows, wrong = table.split("\n\n")[0].splitlines(), []
    assert len(rows) > 30
    for row in rows:
        cells = row.strip("|").split("|")
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", cells[-1])
        if len(cells) != 3 or not named:
            wrong.append(f"no test in the row {row!r}")
        for file, name in named:
            path = ROOT / "tests" / file
            if not path.is_file() or f"\ndef {name}(" not in path.read_text(encoding="utf-8"):
                wrong.append(f"tests/{file} has no {name}")
    assert not wrong, "\n".join(wrong)
