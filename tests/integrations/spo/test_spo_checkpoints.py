"""The degree head in checkpoints: resume bit for bit, best model, no trace in what is exported."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from spo_kernels.integrations import SPOTrainer
from tests.helpers.trl_tiny import Tiny, arguments, history

HEAD_FILE = "spo_degree_head.safetensors"
KINDS = ("full", "lora")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def make_trainer(tiny: Tiny, folder: Path, kind: str = "full", **settings) -> SPOTrainer:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="all")
    return SPOTrainer(
        model=tiny.path,
        args=arguments(folder, **settings),
        train_dataset=tiny.dataset,
        eval_dataset=tiny.dataset.select(range(4)),
        processing_class=tiny.tokenizer,
        peft_config=lora if kind == "lora" else None,
    )


def parameters(trainer: SPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def saved_keys(folder: Path) -> list[str]:
    keys = []
    for path in folder.glob("*.safetensors"):
        if path.name != HEAD_FILE:
            with safe_open(path, "pt") as file:
                keys += file.keys()
    return keys


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_exact(tiny, tmp_path, kind):
    """Four steps, a checkpoint and four more equal eight steps."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    straight = make_trainer(tiny, tmp_path / "run", kind, **settings)
    straight.train()
    resumed = make_trainer(tiny, tmp_path / "run", kind, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    expected, found = parameters(straight), parameters(resumed)
    assert any("spo_degree_head" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert history(resumed, "loss") == history(straight, "loss")
    assert history(resumed, "spo/degree_loss") == history(straight, "spo/degree_loss")


@pytest.mark.parametrize("kind", KINDS)
def test_load_best_model(tiny, tmp_path, kind):
    trainer = make_trainer(
        tiny,
        tmp_path,
        kind,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        save_only_model=True,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        # the head only learns, so the first checkpoint is never the best one by this metric
        metric_for_best_model="eval_spo/degree_loss",
        greater_is_better=True,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    with safe_open(best / HEAD_FILE, "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    last = tmp_path / "checkpoint-3" / HEAD_FILE
    with safe_open(last, "pt") as file:
        assert not torch.equal(file.get_tensor("weight"), saved["weight"])
    for name, parameter in trainer._degree_head.named_parameters():
        assert torch.equal(parameter, saved[name])


@pytest.mark.parametrize("kind", KINDS)
def test_missing_or_other_head(tiny, tmp_path, kind):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tiny, tmp_path, kind, **settings).train()
    checkpoint = tmp_path / "checkpoint-1"

    other = make_trainer(tiny, tmp_path, kind, num_degrees=5, **settings)
    with pytest.raises(ValueError, match=r"weight of shape \(5, 32\), got \(4, 32\)\. Resume with"):
        other.train(resume_from_checkpoint=str(checkpoint))

    (checkpoint / HEAD_FILE).unlink()
    trainer = make_trainer(tiny, tmp_path, kind, **settings)
    with pytest.raises(FileNotFoundError, match=f"must hold {HEAD_FILE}, got none"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("kind", KINDS)
def test_no_head_is_exported(tiny, tmp_path, kind):
    trainer = make_trainer(tiny, tmp_path / "run", kind, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint, final, direct = (tmp_path / name for name in ("run/checkpoint-2", "a", "b"))
    trainer.save_model(str(final))
    assert (checkpoint / HEAD_FILE).is_file()
    folders = [checkpoint, final]
    if kind == "full":
        trainer.model.save_pretrained(direct)
        folders.append(direct)
    for folder in folders:
        assert saved_keys(folder)
        assert not any("degree" in key for key in saved_keys(folder)), folder
        assert "degree" not in json.dumps([path.name for path in final.iterdir()])
    if kind == "full":
        model, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(final)
    assert not any("degree" in name for name, _ in model.named_parameters())
    ids = torch.tensor([[5, 6, 7]])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
        generated = trainer.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 3
