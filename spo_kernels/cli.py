"""Command line: each command imports what it needs when it runs."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

USAGE = """\
usage: spo-kernels COMMAND [flags]

  train    train a model with SPO on preference pairs
  demo     train a small model on the CPU in about two minutes and show what happened
  plan     print the strategies the planner weighs for a model and a context length
  doctor   print devices, versions, and which backend is used and why
  aot      compile every kernel without a GPU and print registers, spills and shared memory
  tune     measure on this device what the planner's time model needs

`spo-kernels COMMAND --help` lists the flags of a command.
"""

TRAIN_HELP = """\
usage: spo-kernels train --dataset_name DATA --model_name_or_path MODEL --output_dir DIR [flags]

  --dataset_name X           hub id, local folder, or a .jsonl, .json or .parquet file of preference
                             pairs: columns chosen, rejected and (optional) prompt, text or messages
  --dataset_train_split X    default train; slices such as train[:90%] work
  --dataset_test_split X     default test; used when --eval_strategy is not no
  --model_name_or_path X     hub id or local folder of the model to align
  --model_config X           instead: a model with random weights, from a folder with a config.json
                             or the built-in shape tiny; its tokenizer is the folder's, or is
                             trained on the dataset. Saved to OUTPUT_DIR/initial_model first
  --output_dir X             where checkpoints and the final model go
  --config FILE              YAML file of flags; the command line wins over it

  --method X                 dpo (default), kto, cpo (also SimPO and AlphaPO) or orpo: the alignment
                             loss beside the degree loss. kto also takes columns prompt, completion
                             and label instead of pairs

  --gamma X                  weight of the degree loss, 0 trains the alignment loss alone
  --num_degrees X            preference degrees K, 2 to 16
  --view X                   hidden (pooled states) or text (shortened responses)
  --degree_head_learning_rate X
  --logprob_budget_mib X     workspace of one log-prob call
  --loss_type X [X ...]      alignment loss as in TRL's config of the method
  --beta X                   inverse temperature of the alignment loss
  --learning_rate X          --per_device_train_batch_size X    --gradient_accumulation_steps X
  --max_length X             --num_train_epochs X               --max_steps X
  --use_peft                 LoRA, with --lora_r X, --lora_alpha X, --lora_target_modules X [X ...]

These are the most used ones. Every field of the method's config (of SPOConfig, so of TRL's
DPOConfig and of transformers' TrainingArguments), ScriptArguments and ModelConfig is a flag:
`spo-kernels train --method X --help-all` lists them, which takes some seconds. Without an
accelerator use_cpu is on and bf16 off unless given.
"""

# shapes of performance tables and examples: hidden size, vocabulary
MODEL_SHAPES = {
    "qwen05": (896, 151936),
    "llama1b": (2048, 128256),
    "gemma1b": (1152, 262144),
    "llama8b": (4096, 128256),
}

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "python-rake",
    "liger-kernel",
    "cut-cross-entropy",
)

MIB = 1024**2


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose flags cannot be shortened."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise SystemExit(complain(self.prog, message))


def complain(prog: str, problem: object) -> int:
    """Print one line on stderr and return the exit code of a user's mistake."""
    print(f"{prog}: {' '.join(str(problem).split())}", file=sys.stderr)
    return 2


def _quiet_deprecations() -> None:
    """Hide what transformers tells TRL about renamed arguments: no user of ours can act on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _train(arguments: Sequence[str]) -> int:
    prog = "spo-kernels train"
    if not arguments or {"-h", "--help"} & set(arguments):
        print(TRAIN_HELP, end="")
        return 0 if arguments else 2
    _quiet_deprecations()
    try:
        from spo_kernels.integrations.command import train
    except ModuleNotFoundError as error:
        return complain(prog, f"{error}. Install it with: pip install 'spo-kernels[trl]'")

    if "--help-all" in arguments:
        others = [word for word in arguments if word != "--help-all"]
        try:
            train.make_parser(train.method_of(others)).print_help()
        except train.SETUP_ERRORS as error:
            return complain(prog, train.first_sentence(error))
        return 0
    try:
        job = train.prepare(arguments)
    except train.SETUP_ERRORS as error:
        return complain(prog, train.first_sentence(error))
    job.run()
    return 0


def _demo(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="spo-kernels demo",
        description="Train a small model with SPO on 40 preference pairs, on the CPU.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("spo-demo"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output_dir must be a folder, got the file {options.output_dir}")
    _quiet_deprecations()
    # read when the hub's client is imported: the demo needs no network and reports nothing
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    # read when torch is imported: its profiler, which measures the memory, logs to the terminal
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        from spo_kernels.integrations.command import demo
    except ModuleNotFoundError as error:
        return complain(parser.prog, f"{error}. Install it with: pip install 'spo-kernels[trl]'")
    demo.run(options.output_dir, seed=options.seed)
    return 0


def _plan(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="spo-kernels plan",
        description="Print the strategies the planner weighs and the one it chooses.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="X",
        help=f"{', '.join(MODEL_SHAPES)}, or a folder that holds a config.json",
    )
    parser.add_argument("--context_tokens", type=int, default=8192, metavar="T")
    parser.add_argument("--pairs", type=int, default=1, metavar="P", help="pairs in one batch")
    parser.add_argument(
        "--frozen_head", action="store_true", help="the LM head needs no gradient (LoRA)"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), metavar="X"
    )
    parser.add_argument("--outputs", nargs="+", default=["logps"], metavar="X")
    parser.add_argument(
        "--budget_mib", type=float, metavar="M", help="default: grows with N, H and V"
    )
    parser.add_argument("--strategy", default="auto", metavar="X")
    parser.add_argument("--device", default="cuda:sm_90", metavar="X", help="cpu, cuda:sm_80, ...")
    options = parser.parse_args(arguments)
    for name in ("context_tokens", "pairs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(options, name)}")
    budget = options.budget_mib
    if budget is not None and not 0 < budget < float("inf"):
        parser.error(f"--budget_mib must be a finite number > 0, got {budget}")
    try:
        hidden_size, vocab_size, softcap = _model_shape(options.model)
    except ValueError as error:
        parser.error(str(error))

    import torch

    from spo_kernels import plan_linear_logprob

    rows = 2 * options.pairs * options.context_tokens
    try:
        plan = plan_linear_logprob(
            rows=rows,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            dtype=getattr(torch, options.dtype),
            needs_grad=("hidden",) if options.frozen_head else ("hidden", "weight"),
            outputs=tuple(options.outputs),
            softcap=softcap,
            budget_bytes=None if budget is None else max(1, int(budget * MIB)),
            strategy=options.strategy,
            device=options.device,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        return complain(parser.prog, error)
    head = "frozen" if options.frozen_head else "trainable"
    print(
        f"{options.model}: hidden {hidden_size}, vocabulary {vocab_size}, {head} head, "
        f"{options.dtype}, {options.pairs} x 2 x {options.context_tokens} = {rows} rows"
    )
    print(plan.explain())
    return 0


def _model_shape(name: str) -> tuple[int, int, float | None]:
    """Return hidden size, vocabulary and softcap of a built-in shape or a config.json."""
    if name in MODEL_SHAPES:
        return *MODEL_SHAPES[name], None
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = ", ".join(MODEL_SHAPES)
        raise ValueError(
            f"--model must be one of {known} or a folder with a config.json, got {name!r}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        return (
            int(config["hidden_size"]),
            int(config["vocab_size"]),
            config.get("final_logit_softcapping"),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON object with hidden_size and vocab_size") from error


def _doctor(arguments: Sequence[str]) -> int:
    _Parser(
        prog="spo-kernels doctor",
        description="Print devices, versions, and which backend is used and why.",
    ).parse_args(arguments)
    import platform
    from importlib import metadata

    import torch

    from spo_kernels.calls.backends import resolve_backend, triton_interpreter_on

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    print(f"{'spo-kernels':<18} {version('spo-kernels')}")
    print(f"{'python':<18} {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:<18} {version(package)}")

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    has_triton = version("triton") != "not installed"
    for device in devices:
        backend = resolve_backend("doctor", "auto", torch.empty(0, device=device))
        if device.type == "cpu":
            what = f"{torch.get_num_threads()} threads"
            why = "Triton kernels need an NVIDIA GPU"
            if triton_interpreter_on():
                why += (
                    "; TRITON_INTERPRET is on, so backend='triton' runs in the interpreter, slowly"
                )
        else:
            facts = torch.cuda.get_device_properties(device)
            what = (
                f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
            )
            if backend == "triton":
                why = "triton is installed and the compute capability is at least 8.0"
            elif not has_triton:
                why = "triton is not installed"
            elif torch.version.cuda is None:
                why = "this torch is not built for CUDA"
            else:
                why = "the compute capability is below 8.0"
        print(f"{device!s:<18} {what}: backend {backend}, because {why}")
    return 0


def _aot(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="spo-kernels aot",
        description="Compile every kernel ahead of time, without a GPU, and print what it uses.",
    )
    parser.add_argument(
        "--archs", nargs="+", default=["sm_80", "sm_90", "sm_100"], metavar="X", help="sm_90 ..."
    )
    options = parser.parse_args(arguments)
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        from spo_kernels.kernels import aot
    except ModuleNotFoundError as error:
        return complain(parser.prog, f"{error}. Install it with: pip install triton rich")

    try:
        with Console(stderr=True).status("compiling, which takes a minute or two"):
            rows = aot.report(archs=tuple(options.archs))
    except (ValueError, RuntimeError, OSError) as error:
        return complain(parser.prog, error)
    table = Table(title="ahead-of-time compiled kernels", box=SIMPLE_HEAD)
    for name in ("kernel", "arch", "tile"):
        table.add_column(name, overflow="fold")
    for name in ("registers", "stack", "spill", "shared bytes", "of"):
        table.add_column(name, justify="right")
    table.add_column("load/store", justify="right")
    table.add_column("instruction")
    for row in rows:
        sizes = (row.registers, row.stack_bytes, row.spill_bytes, row.shared_bytes)
        over = row.spill_bytes or row.shared_bytes > row.shared_limit_bytes or row.is_serialized
        table.add_row(
            row.kernel.removesuffix("_kernel"),
            row.arch,
            row.tile,
            *map(str, (*sizes, row.shared_limit_bytes)),
            f"{row.load_bytes}/{row.store_bytes} B",
            row.instruction + ", serialized" * row.is_serialized,
            style="red" if over else None,
        )
    # a file or a pipe has no width of its own
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _tune(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="spo-kernels tune",
        description="Measure the two rates of the planner's time model on this device, on a GPU "
        "also the tiles of its kernels, and print the rows of both tables. Takes minutes; run it "
        "on an idle machine.",
    )
    parser.add_argument(
        "--device", metavar="X", help="cpu or cuda; default: the GPU if there is one"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's")
    options = parser.parse_args(arguments)
    if options.device not in (None, "cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {options.device!r}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be >= 1, got {options.threads}")
    import torch

    from spo_kernels import tune

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU, and torch sees none")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tune.print_report(torch.device(device))
    except ModuleNotFoundError as error:
        return complain(parser.prog, f"{error}. Install it with: pip install rich")
    except ValueError as error:
        return complain(parser.prog, error)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "demo": _demo,
    "plan": _plan,
    "doctor": _doctor,
    "aot": _aot,
    "tune": _tune,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for a mistake in what was asked."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        print(USAGE, end="", file=sys.stderr)
        return 2
    command, *rest = arguments
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        from importlib import metadata

        print(metadata.version("spo-kernels"))
        return 0
    if command not in COMMANDS:
        return complain(
            "spo-kernels", f"the command must be one of {', '.join(COMMANDS)}, got {command!r}"
        )
    return COMMANDS[command](rest)


if __name__ == "__main__":
    sys.exit(main())
