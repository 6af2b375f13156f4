"""Every script of ``integrations/examples`` run as its reader would, on a tiny model and a CPU."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
)
from trl.trainer import utils as trl_utils

from spo_kernels import integrations
from spo_kernels.integrations.command.demo import PAIRS
from spo_kernels.integrations.command.model_from_config import save_random_model, train_tokenizer

EXAMPLES = Path(integrations.__path__[0]) / "examples"
STEPS = 2
TRAINER = (
    f"--max_steps {STEPS} --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
    "--logging_steps 1 --save_strategy no --report_to none --disable_tqdm True "
    "--learning_rate 1e-3 --gradient_checkpointing False --use_cpu"
)
TRL_TRAINER = (
    f"--model_name_or_path {{model}} --dataset_name {{pairs}} --output_dir out {TRAINER} "
    "--bf16 False"
)
LOOP = f"--model {{model}} --dataset {{pairs}} --output_dir out --steps {STEPS} --device cpu"


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, Path]:
    """A model with random weights and its tokenizer; folders of pairs and of conversations."""
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:8]]
    folder = tmp_path_factory.mktemp("toys")
    conversations = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    texts = [turn["content"] for turns in conversations for turn in turns]
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    save_random_model(config, tokenizer, folder / "model", seed=0)
    scored = [
        {**row, "score_chosen": 9.0 - i, "score_rejected": 2.0 + i} for i, row in enumerate(rows)
    ]
    contents = {
        "pairs": rows,
        "scored": scored,
        "conversations": [{"messages": turns} for turns in conversations],
    }
    for name, lines in contents.items():
        (folder / name).mkdir()
        text = "\n".join(map(json.dumps, lines))
        (folder / name / "train.jsonl").write_text(text, encoding="utf-8")
    return {name: folder / name for name in ("model", *contents)}


@pytest.fixture
def run(toys, tmp_path, monkeypatch, capsys):
    """Run one script by name in an empty folder; return what it printed and that folder."""
    trl_function = trl_utils._ChunkedLogProbFunction

    def run(name: str, flags: str) -> tuple[str, Path]:
        monkeypatch.chdir(tmp_path)
        words = [word.format(**toys) for word in flags.split()]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert trl_utils._ChunkedLogProbFunction is trl_function, "leaves TRL patched"
        return capsys.readouterr().out, tmp_path

    return run


# script -> the flags of each run, one that takes a method with it first
TRAINED = {
    "dpo_patch_trl": [TRL_TRAINER],
    "fsdp2": [TRL_TRAINER],
    "fuse_lm_head": [
        f"--model {{model}} --dataset {{conversations}} --output_dir out {TRAINER} --z_loss 1e-4"
    ],
    "kto_cpo_orpo": [
        f"kto {TRL_TRAINER}",
        f"cpo {TRL_TRAINER} --loss_type simpo --cpo_alpha 0 --simpo_gamma 0.5",
        f"orpo {TRL_TRAINER}",
    ],
    "lora_on_head": [TRL_TRAINER],
    "own_loop": [LOOP],
    "reward_model": [LOOP, LOOP.replace("{pairs}", "{scored}") + " --margin_scale 0.1"],
    "spo": [TRL_TRAINER],
    "spo_lora": [TRL_TRAINER],
}
# script -> a line that it prints beside the losses
SAYS = {
    "dpo_patch_trl": r"trl\.trainer\.dpo_trainer\.add_fused_lm_head: the fused head of DPO is ours",
    "fsdp2": r"^NO, 1 processes$",
    "reward_model": r"accuracy [01]\.\d\d$",
    "spo": r"^degree accuracy 0\.\d\d, by guessing 0\.\d\d$",
}
CASES = [
    pytest.param(name, flags, id=f"{name}{number or ''}")
    for name, runs in TRAINED.items()
    for number, flags in enumerate(runs)
]


@pytest.mark.parametrize(("name", "flags"), CASES)
def test_trains_and_saves(name, flags, run, toys) -> None:
    output, folder = run(name, flags)
    # a trainer's log, or the line of a loop
    losses = [float(x) for x in re.findall(r"(?:'loss': '|  loss )([\d.e+-]+)", output)]
    assert len(losses) == STEPS and all(0 < loss < 20 for loss in losses), output
    assert re.search(SAYS.get(name, ""), output, re.MULTILINE), output
    assert [path.name for path in folder.iterdir()] == ["out"], "writes outside its folder"

    kind = AutoModelForSequenceClassification if name == "reward_model" else AutoModelForCausalLM
    # a folder that holds an adapter loads with its base model
    model = kind.from_pretrained(folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    assert model(**tokenizer("Cut apples", return_tensors="pt")).logits.isfinite().all()
    if name == "lora_on_head":
        trained = load_file(folder / "out" / "adapter_model.safetensors")
        assert any("lm_head.lora_B" in key and value.any() for key, value in trained.items())
    else:
        before = load_file(toys["model"] / "model.safetensors")
        after = load_file(folder / "out" / "model.safetensors")
        assert any(not torch.equal(after[key], before[key]) for key in before.keys() & after.keys())


def test_plan(run) -> None:
    sizes = "--hidden_size 1024 --vocab_size 32000 --pairs 2 --tokens 512 --device cpu"
    output, folder = run("plan", f"{sizes} --budget_mib 256")
    lines = re.findall(r"^(\w+), (\w+) head: (\w+), (\d) products", output, re.MULTILINE)
    assert lines[:2] == [
        ("linear_logprob", "frozen", "direction", "2"),
        ("linear_logprob", "trainable", "resident", "3"),
    ], output
    assert lines[2][:2] == ("linear_preference_loss", "trainable") and len(lines) == 3
    # the row that was chosen is marked
    assert re.findall(r"^ *\* +(\w+) +(\d) ", output, re.MULTILINE) == [("resident", "3")]
    assert not list(folder.iterdir())


def test_data_recipes(run, toys) -> None:
    flags = "--dataset {scored} --on_policy {scored} --on_policy_ratio 0.5 --min_margin 3"
    output, folder = run("data_recipes", flags)
    # margins are 7, 5, 3, 1, ...: three pairs each, of which the mix takes as many as it can
    assert "3 of 8 pairs have a margin of 3.0 or more" in output
    (file,) = folder.iterdir()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert file.name == "pairs.jsonl" and f"{len(rows)} rows written" in output
    assert len(rows) == 2 * int(re.search(r"(\d+) pairs mixed", output)[1]) > 0
    for row, swapped in zip(rows[::2], rows[1::2], strict=True):
        assert row["chosen"] == swapped["rejected"] and row["rejected"] == swapped["chosen"]
        assert row["prompt"][0]["role"] == "system"


def test_every_script_has_a_case() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*TRAINED, "data_recipes", "plan"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_reads_like_an_example(path) -> None:
    """Short, its first lines show the call, and an import runs nothing."""
    text = path.read_text(encoding="utf-8")
    assert 20 <= len(text.splitlines()) <= 60
    assert f"spo_kernels.integrations.examples.{path.stem} " in text.split('"""')[1]
    assert text.endswith('if __name__ == "__main__":\n    main()\n')
