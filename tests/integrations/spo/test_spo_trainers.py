"""SPO beside KTO, CPO and ORPO: TRL's losses at gamma 0, else TRL's plus the naive degree loss."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from trl.experimental.utils import DPODataCollatorWithPadding

from spo_kernels import smart_stop_words
from spo_kernels.integrations import (
    SPOConfig,
    SPOCPOTrainer,
    SPOTrainer,
    patch_trl,
)
from tests.helpers.spo_cases import CLASSES, METHODS, VIEWS, build_spo, spo_case
from tests.helpers.spo_naive import naive_metrics, randomize_head
from tests.helpers.trl_tiny import ADJECTIVES, NOUNS, Tiny, arguments, history
from tests.helpers.trl_trainers import CASES, Data, build, compare, lora, train

HEAD_FILE = "spo_degree_head.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    return Data(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("name", CLASSES)
def test_gamma_zero_is_trl(name, patched, data, tmp_path):
    """Losses and metrics of each of four steps, the parameters after them."""
    stock = build(name, data, tmp_path / "stock", steps=4)
    start = {n: p.detach().clone() for n, p in stock.model.named_parameters()}
    expected = train(stock)
    with patch_trl() if patched else nullcontext():
        found = train(build_spo(name, data, tmp_path / "spo", steps=4, gamma=0.0))
    added = [{k: log.pop(k) for k in list(log) if k.startswith("spo/")} for log in found.logs]
    assert [list(log) for log in added] == [["spo/alignment_loss"]] * 4
    compare(found, expected, start, steps=4)


def gradients(trainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    named = trainer.model.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


def loss_of_rows(trainer, count: int) -> torch.Tensor:
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(count))))
    return trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))


def check_against_naive(trainer, stock, count: int) -> None:
    """The loss is TRL's plus gamma times the naive one, and so is every gradient."""
    randomize_head(trainer)
    loss, alignment = loss_of_rows(trainer, count), loss_of_rows(stock, count)
    naive = naive_metrics(trainer, trainer.train_dataset.select(range(count)))["degree_loss"]
    expected = alignment.item() + trainer.args.gamma * naive.item()
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    found, plain = gradients(trainer, loss), gradients(stock, alignment)
    degree = gradients(trainer, trainer.args.gamma * naive)
    for name, value in found.items():
        wanted = degree[name] + plain.get(name, 0.0)
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5, msg=name)
    body = [value for name, value in degree.items() if "layers" in name]
    assert min(value.abs().max() for value in body if value.dim() > 1) > 0.0
    assert found["spo_degree_head.weight"].abs().max() > 1e-3


SETTINGS = {
    "hidden": {},
    "text": {"view": "text"},
    "hidden_cut": {"max_length": 30, "center_views": True},
    "text_cut": {"view": "text", "pooling": "last", "max_length": 30},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", CLASSES)
def test_loss_and_gradients(name, settings, data, tmp_path):
    changes = SETTINGS[settings]
    stock_changes = {k: v for k, v in changes.items() if k == "max_length"}
    trainer = build_spo(name, data, tmp_path / "spo", gamma=0.7, **changes)
    stock = build(name, data, tmp_path / "stock", **stock_changes)
    ran = []
    trainer._degree_head.register_forward_hook(lambda *_: ran.append("degree head"))
    trainer.model.lm_head.register_forward_hook(lambda *_: ran.append("logits"))
    check_against_naive(trainer, stock, 4)
    # neither the pass for KTO's divergence nor the reference's reads the head
    assert ran == ["degree head"]


@pytest.mark.parametrize("view", VIEWS)
def test_a_row_whose_response_is_cut_away(view, data, tmp_path):
    """CPO keeps a prompt that fills ``max_length``: its responses add nothing to the loss."""
    long = {**data.rows[0], "prompt": data.rows[0]["prompt"] * 20}
    rows = Dataset.from_list([long, *data.rows[1:4]])
    trainers = []
    for case in (spo_case("cpo"), CASES["cpo"]):
        settings = {"max_length": 48, "use_cpu": True, "bf16": False, "report_to": "none"}
        if case.trainer is SPOCPOTrainer:
            settings |= {"view": view, "gamma": 0.7}
        trainers.append(
            case.trainer(
                model=data.model(),
                args=case.config(str(tmp_path), **settings),
                train_dataset=rows,
                processing_class=data.tokenizer,
            )
        )
    batch = trainers[0].data_collator(list(trainers[0].train_dataset))
    assert not (batch["chosen_labels"][0] != -100).any()
    check_against_naive(*trainers, count=4)


def test_responses_are_weighed_by_side_or_alike(data, tmp_path):
    """KTO's L is one mean over all responses, half of the two means of the same pairs."""
    kto = build_spo("kto", data, tmp_path / "kto")
    pairs = build_spo("cpo", data, tmp_path / "cpo", max_length=1024)
    randomize_head(kto), randomize_head(pairs)
    losses = []
    for trainer, count in ((kto, 8), (pairs, 4)):
        loss_of_rows(trainer, count)
        losses.append(trainer._degree_metrics["train"].pop()["spo/degree_loss"])
    # the end token is written by TRL in one trainer and by its tokenizer in the other
    assert losses[0] == pytest.approx(losses[1] / 2, rel=1e-5)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_resume_and_export(name, kind, view, data, tmp_path):
    """Two steps, a checkpoint and two more equal four steps; no head in what is exported."""
    settings = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "view": view}
    if name == "kto":
        settings["precompute_ref_log_probs"] = view == "text"
    adapter = lora("q_proj", "v_proj") if kind == "lora" else None

    def trainer_of():
        return build_spo(name, data, tmp_path / "run", adapter, steps=4, gamma=0.5, **settings)

    straight = trainer_of()
    before = {n: p.detach().clone() for n, p in straight.model.named_parameters()}
    straight.train()
    changed = {n for n, p in straight.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in straight.model.named_parameters() if p.requires_grad}
    assert any("spo_degree_head" in n for n in changed)
    for metric in ("degree_accuracy", "degree_chance", "no_key_content", "alignment_loss"):
        assert len(history(straight, f"spo/{metric}")) == 4
    parts = zip(
        history(straight, "spo/alignment_loss"), history(straight, "spo/degree_loss"), strict=True
    )
    assert history(straight, "loss") == pytest.approx([a + 0.5 * d for a, d in parts], abs=1e-4)

    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / HEAD_FILE).is_file()
    resumed = trainer_of()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for n, parameter in straight.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(n), parameter), n
    assert history(resumed, "loss") == history(straight, "loss")

    # what push_to_hub saves, then what the user does
    straight.save_model(_internal_call=True)
    straight.save_model(str(tmp_path / "final"))
    loader = AutoModelForCausalLM if kind == "full" else AutoPeftModelForCausalLM
    for folder in (tmp_path / "run", tmp_path / "final"):
        assert not (folder / HEAD_FILE).exists()
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                assert not any("degree" in key for key in file.keys())  # noqa: SIM118
        configs = [json.dumps(json.loads(path.read_text())) for path in folder.glob("*.json")]
        assert configs and not any("degree" in text for text in configs)
        model = loader.from_pretrained(folder)
        ids = torch.tensor([[5, 6, 7]])
        straight.model.eval()
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, straight.model(input_ids=ids).logits)


@pytest.mark.parametrize("plain", [False, True], ids=["conversational", "plain"])
@pytest.mark.parametrize("name", METHODS)
def test_levels_of_a_cut_batch(name, plain, tmp_path):
    """The marked tokens of a batch spell the key content, as far as ``max_length`` reaches."""
    tiny = Tiny(tmp_path, plain=plain)
    # CPO and ORPO write a start token by themselves
    tiny.tokenizer.bos_token = "<|turn|>"
    rows = tiny.dataset
    if name == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in tiny.rows
            for side in ("chosen", "rejected")
        ]
        rows = Dataset.from_list(rows)
    length = 20 if plain else 44
    kind, config = CLASSES[name]
    trainer = kind(
        model=tiny.path,
        args=arguments(tmp_path / "run", config, max_length=length),
        train_dataset=rows,
        processing_class=tiny.tokenizer,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    sides = ("",) if name == "kto" else ("chosen_", "rejected_")
    ids = torch.cat([batch[f"{side}input_ids"] for side in sides])
    levels = batch["removal_levels"]
    assert ids.shape == levels.shape == (40, length)
    if name != "kto":
        labels = torch.cat([batch["chosen_labels"], batch["rejected_labels"]])
        assert torch.equal(labels != -100, levels >= 0)
        assert (ids[:, 0] == tiny.tokenizer.bos_token_id).all()
    assert torch.equal(batch["completion_mask"] == 1, levels >= 0)
    words, seen = {*ADJECTIVES, *NOUNS} - set(smart_stop_words()), 0
    # the cut may go through a word, and a space is part of a token or not
    starts = {word[:size] for word in words for size in range(len(word))}
    spelled = re.compile(f"({'|'.join(words)})*({'|'.join(starts)})")
    for row, row_levels in zip(ids, levels, strict=True):
        removed = tiny.tokenizer.decode(row[row_levels > 0]).replace(".", "").replace(" ", "")
        kept = tiny.tokenizer.decode(row[row_levels == 0]).replace(".", "").split()
        assert spelled.fullmatch(removed) and not words & set(kept)
        seen += len(removed)
    assert seen > 200


@pytest.mark.parametrize("name", METHODS)
def test_evaluation(name, data, tmp_path):
    trainer = build_spo(name, data, tmp_path, eval_dataset=True, gamma=0.5)
    randomize_head(trainer)
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = naive_metrics(trainer, trainer.eval_dataset)
    for metric, value in expected.items():
        assert metrics[f"eval_spo/{metric}"] == pytest.approx(float(value), abs=2e-5), metric
    total = metrics["eval_spo/alignment_loss"] + 0.5 * metrics["eval_spo/degree_loss"]
    assert metrics["eval_loss"] == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_trains_under_the_patch(name, data, tmp_path):
    """An adapter on the LM head, which TRL's fused heads refuse, beside the degree head."""
    with patch_trl():
        trainer = build_spo(name, data, tmp_path, lora("lm_head"), steps=2, gamma=0.5)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
    for n, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[n]) != parameter.requires_grad, n


@pytest.mark.parametrize("name", ["dpo", *METHODS])
def test_refused(name, data, tmp_path):
    kind, config = {**CLASSES, "dpo": (SPOTrainer, SPOConfig)}[name]
    rows = {"processing_class": data.tokenizer, "train_dataset": getattr(data, CASES[name].data)}
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(data.tokenizer), **shape))
    with pytest.raises(NotImplementedError, match="encoder-decoder models are not supported"):
        kind(model=t5, args=arguments(tmp_path, config), **rows)
    wrong = arguments(tmp_path, CASES[name].config)
    with pytest.raises(
        TypeError, match=f"{kind.__name__}: args must be an {config.__name__}, got "
    ):
        kind(model=data.model(), args=wrong, **rows)


@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_other_collator(name, data, tmp_path):
    trainer = build_spo(name, data, tmp_path)
    trainer.data_collator = DPODataCollatorWithPadding(pad_token_id=0)
    with pytest.raises(ValueError, match="batch must have removal_levels, got"):
        trainer.train()
