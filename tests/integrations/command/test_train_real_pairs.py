"""The main job on real input: the command line trains a small model on 300 preference pairs."""

import json
import math

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from spo_kernels.cli import main


@pytest.mark.slow
def test_train_on_real_pairs(real_pairs, tmp_path):
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    config.save_pretrained(tmp_path / "shape")
    output = tmp_path / "run"
    flags = {
        "dataset_name": real_pairs,
        "dataset_train_split": "train[:90%]",
        "dataset_test_split": "train[90%:]",
        "model_config": tmp_path / "shape",
        "output_dir": output,
        "max_steps": 80,
        "eval_strategy": "steps",
        "eval_steps": 80,
        "per_device_train_batch_size": 4,
        "max_length": 256,
        "learning_rate": 1e-3,
        "gamma": 0.5,
        "num_degrees": 4,
        "logging_steps": 10,
        "save_steps": 80,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 0,
    }
    code = main(["train", *(str(w) for name, v in flags.items() for w in (f"--{name}", v))])
    assert not code

    state = json.loads((output / "checkpoint-80" / "trainer_state.json").read_text("utf-8"))
    log = [entry for entry in state["log_history"] if "spo/degree_loss" in entry]
    assert len(log) == 8
    for entry in log:
        assert all(math.isfinite(v) for v in entry.values() if isinstance(v, float))

    def mean(name: str, entries: list[dict]) -> float:
        return sum(entry[name] for entry in entries) / len(entries)

    first, last = log[:2], log[-2:]
    assert mean("loss", last) < 0.9 * mean("loss", first)
    assert mean("spo/alignment_loss", last) < 0.95 * mean("spo/alignment_loss", first)
    assert mean("spo/degree_loss", last) < 0.9 * mean("spo/degree_loss", first)
    # a quarter of the views belong to the most frequent degree
    assert mean("spo/degree_chance", last) < 0.35
    assert mean("spo/degree_accuracy", last) > mean("spo/degree_chance", last) + 0.15
    assert mean("spo/no_key_content", log) < 0.15
    (held_out,) = [entry for entry in state["log_history"] if "eval_spo/degree_loss" in entry]
    assert held_out["eval_spo/degree_accuracy"] > held_out["eval_spo/degree_chance"] + 0.08
    model = AutoModelForCausalLM.from_pretrained(output)
    assert not any("degree" in name for name, _ in model.named_parameters())
