"""The command line: what it prints, what it refuses in one line, and what it leaves on the disk."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from spo_kernels import cli

COMMANDS = ("train", "demo", "plan", "doctor", "aot", "tune")


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def conversational(number: int) -> dict[str, Any]:
    return {
        "prompt": messages("user", f"What is good about fruit number {number}?"),
        "chosen": messages("assistant", f"Fruit {number} has vitamins, fibre and a sweet taste."),
        "rejected": messages("assistant", f"I do not know anything about fruit {number}, sorry."),
    }


def plain(number: int) -> dict[str, str]:
    return {name: value[0]["content"] + " " for name, value in conversational(number).items()}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def cache_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "pairs.jsonl", map(conversational, range(8)))


def train_flags(dataset: str, output_dir: Path) -> list[str]:
    return [
        *("train", "--dataset_name", dataset, "--model_config", "tiny"),
        *(
            "--output_dir",
            str(output_dir),
            "--max_steps",
            "2",
            "--per_device_train_batch_size",
            "4",
        ),
        *("--max_length", "128", "--report_to", "none", "--save_strategy", "no"),
    ]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must be refused and return the one line it printed."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    # progress bars of loading share the stream
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip() and not re.search(r"(examples|it)/s", line)]
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"spo-kernels {arguments[0]}: ")
    return lines[0]


def test_help_waits_for_no_library() -> None:
    code = f"""
import sys
before = set(sys.modules)
from spo_kernels.cli import main
for command in {["", *COMMANDS]!r}:
    try:
        main([*command.split(), "--help"])
    except SystemExit as stop:
        assert not stop.code, command
    added = {{name.split(".")[0] for name in set(sys.modules) - before}}
    assert added <= {{"spo_kernels", *sys.stdlib_module_names}}, (command, added)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ([], *([name] for name in COMMANDS)):
        usage = f"usage: {' '.join(['spo-kernels', *command])}"
        assert any(line.startswith(usage) for line in done.stdout.splitlines()), usage


def test_train_help_names_real_flags(capsys: pytest.CaptureFixture[str]) -> None:
    from spo_kernels.integrations.command.train import make_parser

    flags = {flag for action in make_parser()._actions for flag in action.option_strings}
    # read by TRL's parser and by us before argparse sees them
    flags |= {"--config", "--help-all"}
    named = {word.strip("`,.)(") for word in cli.TRAIN_HELP.split() if word.startswith("--")}
    assert named <= flags, named - flags
    assert cli.main(["train", "--help-all"]) == 0
    assert "--gamma" in capsys.readouterr().out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert (
        "must be one of train, demo, plan, doctor, aot, tune, got 'trian'"
        in capsys.readouterr().err
    )
    assert cli.main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import spo_kernels

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == spo_kernels.__version__


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--learning_rat", "1"], "unknown argument --learning_rat, did you mean --learning_rate"),
        (["--frobnicate"], "unknown argument --frobnicate"),
        (["--beta", "high"], "argument --beta: invalid"),
        (["--max_steps", "1.5"], "--max_steps/--max-steps: invalid int value: '1.5'"),
        (["--loss_type", "frob"], "got 'frob'"),
        (["--gamma", "-1"], "gamma must be a finite number >= 0.0, got -1.0"),
        (["--num_degrees", "1"], "num_degrees must be"),
        (["--view", "sideways"], "--view: invalid choice: 'sideways'"),
        (["--logprob_budget_mib", "0.001"], "budget"),
        (["--model_name_or_path", "somewhere"], "exactly one of --model_name_or_path and"),
        (["--model_config", "nowhere"], "must be 'tiny' or a folder with a config.json"),
        (["--method", "ppo"], "--method must be one of 'dpo', 'kto', 'cpo', 'orpo', got 'ppo'"),
        (["--method"], "argument --method: expected one argument"),
        (["--method", "kto", "--label_smoothing", "0.1"], "unknown argument --label_smoothing"),
        (["--method", "kto", "--loss_type", "frob"], "invalid choice: 'frob'"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--dataset_train_split", "validation"], "a file has only the split 'train'"),
    ],
)
def test_train_refuses_flags(
    flags: list[str],
    sentence: str,
    pairs: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output_dir = tmp_path / "out"
    assert sentence in refused(capsys, [*train_flags(pairs, output_dir), *flags])
    assert not output_dir.exists()


def without(name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in conversational(0).items() if key != name}]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "must have at least one row, got the empty file"),
        (without("rejected"), "must have a column 'rejected', got ['chosen', 'prompt']"),
        ([plain(0), {**plain(1), "chosen": " "}], "row 1 must have a response in 'chosen'"),
        (
            [conversational(0), {**conversational(1), "rejected": messages("assistant", "")}],
            "row 1 must have a response in 'rejected', got an empty one",
        ),
        ([{**conversational(0), "rejected": []}], "row 0 must have a response in 'rejected'"),
        ([{**conversational(0), "prompt": []}], "row 0 must have a prompt"),
        ([{**conversational(0), "prompt": "text"}], "must be all text or all lists of messages"),
        ([{**plain(0), "chosen": None}], "must be all text or all lists of messages"),
    ],
)
def test_train_refuses_data(
    rows: list[dict[str, Any]],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output_dir = tmp_path / "out"
    dataset = write_jsonl(tmp_path / "bad.jsonl", rows)
    assert sentence in refused(capsys, train_flags(dataset, output_dir))
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("absent.jsonl", None, "absent.jsonl"),
        ("broken.jsonl", '{"prompt": \n', "JSON parse error"),
        ("pairs.csv", "prompt,chosen,rejected\n", "pairs.csv"),
    ],
)
def test_train_refuses_files(
    name: str,
    text: str | None,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output_dir = tmp_path / "out"
    dataset = tmp_path / name
    if text is not None:
        dataset.write_text(text, encoding="utf-8")
    assert sentence in refused(capsys, train_flags(str(dataset), output_dir))
    assert not output_dir.exists()


def test_train_refuses_a_file_as_output(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "must be a folder" in refused(capsys, train_flags(pairs, file))


def test_train_refusal_keeps_what_was_there(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    (output_dir / "notes.txt").write_text("mine", encoding="utf-8")
    refused(capsys, [*train_flags(pairs, output_dir), "--model_config", "nowhere"])
    assert [path.name for path in output_dir.iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["conversational.jsonl", "plain.json", "plain.parquet"])
def test_train(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / form
    rows = map(conversational if form.startswith("conv") else plain, range(8))
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    else:
        write_jsonl(path, rows)
    output_dir = tmp_path / "out"
    assert cli.main(train_flags(str(path), output_dir)) == 0
    assert "No accelerator found: use_cpu=True, bf16=False" in capsys.readouterr().out
    for folder in (output_dir, output_dir / "initial_model"):
        AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kto", "cpo", "orpo"])
def test_train_with_another_method(method: str, pairs: str, tmp_path: Path) -> None:
    """By flag, and from a file, whose other keys are then the method's."""
    from transformers import AutoModelForCausalLM

    flags = train_flags(pairs, tmp_path / "out")
    assert cli.main([*flags, "--method", method, "--view", "text"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = tmp_path / "train.yaml"
    own = {"kto": "desirable_weight", "cpo": "simpo_gamma", "orpo": "padding_value"}[method]
    config.write_text(json.dumps({"method": method, own: 1}), encoding="utf-8")
    flags = train_flags(pairs, tmp_path / "file")
    assert cli.main([*flags, "--config", str(config), "--use_peft", "--lora_r", "4"]) == 0
    assert (tmp_path / "file" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_train_on_single_responses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in map(conversational, range(4))
        for side in ("chosen", "rejected")
    ]
    path = write_jsonl(tmp_path / "single.jsonl", rows)
    assert cli.main([*train_flags(path, tmp_path / "out"), "--method", "kto"]) == 0
    assert "must have a column 'chosen' and 'rejected'" in refused(
        capsys, train_flags(path, tmp_path / "dpo")
    )
    bare = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    path = write_jsonl(tmp_path / "bare.jsonl", bare)
    assert "must have a column 'label'" in refused(
        capsys, [*train_flags(path, tmp_path / "bare"), "--method", "kto"]
    )


@pytest.mark.slow
def test_train_from_a_config_file(pairs: str, tmp_path: Path) -> None:
    """A YAML file gives the flags, the command line wins, a folder's own config gives the shape."""
    from transformers import AutoConfig, LlamaConfig

    LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    ).save_pretrained(tmp_path / "shape")
    output_dir = tmp_path / "out"
    words = train_flags(pairs, output_dir)[1:]
    flags = {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}
    flags |= {"model_config": str(tmp_path / "shape"), "max_steps": 50, "gamma": 0.5}
    flags |= {"per_device_train_batch_size": 4, "max_length": 128}
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps(flags), encoding="utf-8")
    arguments = ["train", f"--config={config}", "--max_steps", "1", "--dataset_train_split"]
    arguments += ["train[:75%]", "--dataset_test_split", "train[75%:]", "--eval_strategy", "steps"]
    assert cli.main([*arguments, "--eval_steps", "1", "--use_peft", "--lora_r", "4"]) == 0
    assert AutoConfig.from_pretrained(output_dir / "initial_model").vocab_size == 600
    assert (output_dir / "adapter_config.json").is_file()


def test_train_refuses_unknown_keys_of_a_config_file(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("gama: 1.0\n", encoding="utf-8")
    flags = [*train_flags(pairs, tmp_path / "out"), "--config", str(config)]
    assert "unknown argument --gama, did you mean --gamma" in refused(capsys, flags)


@pytest.mark.slow
def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spo_kernels.integrations.command import demo

    monkeypatch.setattr(demo, "WARM_UP_STEPS", 2)
    monkeypatch.setattr(demo, "SPO_STEPS", 2)
    assert cli.main(["demo", "--output_dir", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    for word in ("alignment loss", "reward accuracy", "degree accuracy", "peak memory", "strategy"):
        assert word in printed
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "demo" / "model")
    prompt = messages("user", "Why is the sea salty?")
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[0] == 1


def test_demo_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "must be a folder" in refused(capsys, ["demo", "--output_dir", str(file)])
    assert "unrecognized arguments: --output" in refused(capsys, ["demo", "--output", "x"])


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spo_kernels import plan_linear_logprob

    assert cli.main(["plan", "--model", "llama8b", "--context_tokens", "4096"]) == 0
    printed = capsys.readouterr().out
    assert "hidden 4096, vocabulary 128256, trainable head" in printed
    import torch

    plan = plan_linear_logprob(rows=8192, hidden_size=4096, vocab_size=128256, dtype=torch.bfloat16)
    assert plan.explain() in printed

    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"hidden_size": 64, "vocab_size": 999}}), encoding="utf-8"
    )
    flags = ["plan", "--model", str(tmp_path), "--frozen_head", "--device", "cpu"]
    assert cli.main(flags) == 0
    assert "hidden 64, vocabulary 999, frozen head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "nosuch"], "--model must be one of qwen05, llama1b"),
        (["--model", "llama8b", "--budget_mib", "0.5"], "budget_bytes must be at least"),
        (["--model", "llama8b", "--strategy", "magic"], "strategy must be one of"),
        (["--model", "llama8b", "--context_tokens", "0"], "--context_tokens must be >= 1, got 0"),
        (["--model", "llama8b", "--pairs", "two"], "argument --pairs: invalid int value"),
        (["--model", "llama8b", "--context", "9"], "unrecognized arguments: --context 9"),
    ],
)
def test_plan_refuses(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refused(capsys, ["plan", *flags])


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "backend torch, because Triton kernels need an NVIDIA GPU" in printed


def test_aot(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from spo_kernels.kernels import aot

    row = aot.AotRow(
        kernel="some_op_fwd_kernel",
        arch="sm_90",
        tile="128x256x64",
        registers=240,
        stack_bytes=0,
        spill_bytes=0,
        shared_bytes=101_376,
        shared_limit_bytes=232_448,
        instruction="wgmma",
        load_bytes=8,
        store_bytes=16,
        is_serialized=True,
    )
    asked = []
    monkeypatch.setattr(aot, "report", lambda archs: asked.append(archs) or [row])
    assert cli.main(["aot", "--archs", "sm_90"]) == 0
    printed = capsys.readouterr().out
    assert asked == [("sm_90",)]
    for word in ("some_op_fwd", "sm_90", "240", "8/16 B", "wgmma", "serialized"):
        assert word in printed

    def fail(archs: tuple[str, ...]) -> None:
        raise ValueError("aot: archs must be known,\ngot sm_1")

    monkeypatch.setattr(aot, "report", fail)
    assert "archs must be known, got sm_1" in refused(capsys, ["aot", "--archs", "sm_1"])


@pytest.mark.parametrize(
    ("flag", "value", "text"),
    [
        ("logprob_budget_mib", "0.00001", "logprob_budget_mib must hold at least one row"),
        ("kernel_backend", "triton", "kernel_backend='triton' must run on a CUDA device"),
        ("max_length", "2", "must keep at least one row whose prompt is shorter"),
        ("resume_from_checkpoint", "absent", "--resume_from_checkpoint must be"),
        ("resume_from_checkpoint", "out", "must hold spo_degree_head.safetensors"),
    ],
)
def test_refusals_leave_no_model(
    flag: str, value: str, text: str, pairs: str, tmp_path: Path, capsys
) -> None:
    """What this call wrote into an existing folder goes; what was there stays."""
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    (output_dir / "mine.txt").write_text("kept")
    if flag == "resume_from_checkpoint":
        value = str(tmp_path / value)
    assert cli.main([*train_flags(pairs, output_dir), f"--{flag}", value]) == 2
    assert text in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in output_dir.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--budget_mib", "inf"], "--budget_mib must be a finite number > 0, got inf"),
        (["--budget_mib", "-5"], "--budget_mib must be a finite number > 0, got -5.0"),
        (["--device", "cuda:sm_xx"], "device must be 'cpu' or 'cuda:sm_<arch>'"),
    ],
)
def test_plan_refusals(flags: list[str], text: str, capsys) -> None:
    try:
        code = cli.main(["plan", "--model", "qwen05", *flags])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and text in capsys.readouterr().err


def test_tune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from spo_kernels import tune

    monkeypatch.setattr(tune, "_CPU_SHAPES", ((64, 32, 600), (64, 256, 600)))
    # toy times fit no model: the rates are another test's
    monkeypatch.setattr(tune, "fit", lambda points: (2e11, 1e10))
    assert cli.main(["tune", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "predicted / measured" in printed and "64 x 256 x 600" in printed
    assert '"cpu": DeviceFacts(2.00e+11, 1.00e+10, 64 * _MIB),' in printed
    assert "must be cpu or cuda, got 'tpu'" in refused(capsys, ["tune", "--device", "tpu"])
    assert "must be >= 1, got 0" in refused(capsys, ["tune", "--threads", "0"])
