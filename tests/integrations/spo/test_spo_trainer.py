"""SPOTrainer: the loss it adds, the metrics it logs, and every way of training that TRL has."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from spo_kernels.integrations import SPOTrainer
from spo_kernels.integrations.spo.text_views import pool_views
from tests.helpers.spo_naive import naive_metrics, randomize_head
from tests.helpers.trl_tiny import Tiny, arguments, history

DEGREE_METRICS = ("degree_loss", "degree_accuracy", "degree_chance", "no_key_content")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def make_trainer(tiny: Tiny, folder, *, kind=SPOTrainer, model=None, **settings):
    names = ("peft_config", "eval_dataset", "train_dataset", "optimizers", "data_collator")
    names += ("compute_metrics",)
    passed = {name: settings.pop(name) for name in names if name in settings}
    passed.setdefault("train_dataset", tiny.dataset)
    config = {SPOTrainer: {}, DPOTrainer: {"kind": DPOConfig}}[kind]
    return kind(
        model=model or tiny.path,
        args=arguments(folder, **config, **settings),
        processing_class=tiny.tokenizer,
        **passed,
    )


@pytest.mark.parametrize("settings", [{}, {"loss_type": ["sigmoid", "sft"], "beta": 0.3}])
def test_gamma_zero_is_dpo(tiny, tmp_path, settings):
    losses = {}
    for kind, extra in ((DPOTrainer, {}), (SPOTrainer, {"gamma": 0.0})):
        trainer = make_trainer(tiny, tmp_path, kind=kind, max_steps=10, **settings, **extra)
        trainer.train()
        losses[kind] = history(trainer, "loss")
    assert len(losses[SPOTrainer]) == 10
    assert losses[SPOTrainer] == pytest.approx(losses[DPOTrainer], abs=1e-5)
    assert history(trainer, "spo/alignment_loss") == pytest.approx(losses[SPOTrainer], abs=1e-4)
    assert not history(trainer, "spo/degree_loss")
    assert not any("degree" in name for name, _ in trainer.model.named_parameters())


SETTINGS = [
    {},
    {"center_views": True, "share_degree_head": False, "num_degrees": 3},
    {"view": "text"},
    {"view": "text", "pooling": "last", "share_degree_head": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_loss_and_metrics(tiny, tmp_path, settings):
    empty = [{"role": "assistant", "content": "That is it."}]
    rows = [*tiny.rows[:6], {**tiny.rows[6], "chosen": empty}]
    trainer = make_trainer(
        tiny, tmp_path, gamma=0.7, eval_dataset=Dataset.from_list(rows), **settings
    )
    randomize_head(trainer)
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = naive_metrics(trainer, trainer.eval_dataset)
    assert expected["no_key_content"] == pytest.approx(1 / 14)
    for name in DEGREE_METRICS:
        assert metrics[f"eval_spo/{name}"] == pytest.approx(float(expected[name]), abs=2e-5), name

    batch = next(iter(trainer.get_eval_dataloader()))
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.log(logs := {})
    parts = logs["eval_spo/alignment_loss"], logs["eval_spo/degree_loss"]
    assert loss.item() == pytest.approx(parts[0] + 0.7 * parts[1], abs=1e-5)
    # the policy is the reference before the first step
    assert parts[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients(tiny, tmp_path, settings):
    """The gradient is DPO's plus gamma times that of the naive degree loss."""
    trainer = make_trainer(tiny, tmp_path, gamma=0.7, train_dataset=tiny.dataset, **settings)
    randomize_head(trainer)
    trainer.model.train()
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    found = gradients(trainer.compute_loss(trainer.model, batch))
    trainer.args.gamma = 0.0
    expected = gradients(trainer.compute_loss(trainer.model, batch))
    naive = naive_metrics(trainer, trainer.train_dataset.select(range(2)))["degree_loss"]
    trainer.model.zero_grad()
    (0.7 * naive).backward()
    for name, parameter in trainer.model.named_parameters():
        total = expected[name] + (0.0 if parameter.grad is None else parameter.grad)
        torch.testing.assert_close(found[name], total, atol=2e-6, rtol=1e-4, msg=name)
    assert trainer._degree_head.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("view", ["hidden", "text"])
def test_one_forward_call(tiny, tmp_path, view):
    trainer = make_trainer(tiny, tmp_path, view=view, max_steps=1)
    calls = []
    trainer.model.base_model.register_forward_hook(
        lambda module, inputs, kwargs, output: calls.append(output.last_hidden_state),
        with_kwargs=True,
    )
    trainer.train()
    (hidden,) = [states for states in calls if states.requires_grad]
    assert len(hidden) == 4 if view == "hidden" else len(hidden) > 8


WAYS = {
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "autocast": {"bf16": True},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "weighting": {"use_weighting": True},
    "budget": {"logprob_budget_mib": 0.5, "kernel_backend": "torch"},
    "lora": {"lora": True},
    "lora_precomputed": {"lora": True, "precompute_ref_log_probs": True},
    "lora_checkpointing": {"lora": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize(
    ("way", "view"),
    [(way, "hidden") for way in WAYS]
    + [(way, "text") for way in ("accumulation", "autocast", "lora_checkpointing")],
)
def test_ways_of_training(tiny, tmp_path, way, view):
    settings = dict(WAYS[way])
    if settings.pop("lora", False):
        settings["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(
        tiny,
        tmp_path,
        view=view,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=tiny.dataset.select(range(3)),
        **settings,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for prefix in ("", "eval_"):
        for name in (*DEGREE_METRICS, "alignment_loss"):
            values = history(trainer, f"{prefix}spo/{name}")
            assert len(values) == (2 if prefix == "" else 1)
            assert all(0.0 <= value < 10.0 for value in values), name
    losses, degree = history(trainer, "loss"), history(trainer, "spo/degree_loss")
    alignment = history(trainer, "spo/alignment_loss")
    total = [a + trainer.args.gamma * d for a, d in zip(alignment, degree, strict=True)]
    assert losses == pytest.approx(total, abs=1e-3)
    # the head starts from zero, so the first loss is log K
    assert degree[0] == pytest.approx(2 * torch.log(torch.tensor(4.0)).item(), abs=1e-3)
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert changed == trainable
    assert any("spo_degree_head" in name for name in changed)


@pytest.mark.parametrize("plain", [False, True], ids=["conversational", "plain"])
def test_iterable_dataset(tmp_path, plain):
    tiny = Tiny(tmp_path, plain=plain)
    streamed = IterableDataset.from_generator(lambda: iter(tiny.rows))
    trainer = make_trainer(tiny, tmp_path, train_dataset=streamed)
    trainer.train()
    assert len(history(trainer, "spo/degree_loss")) == 2
    assert history(trainer, "spo/no_key_content") == [0.0, 0.0]


def test_optimizer_group(tiny, tmp_path):
    trainer = make_trainer(
        tiny, tmp_path, weight_decay=0.1, degree_head_learning_rate=0.02, lr_scheduler_type="linear"
    )
    trainer.train()
    *trunk, head = trainer.optimizer.param_groups
    assert {id(p) for p in head["params"]} == {id(p) for p in trainer._degree_head.parameters()}
    assert head["weight_decay"] == 0.0 and head["initial_lr"] == 0.02
    assert [group["weight_decay"] for group in trunk] == [0.1, 0.0]
    assert all(group["initial_lr"] == 1e-3 for group in trunk)
    together = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in trainer.model.parameters())

    # an optimizer of the user's own gets the group as well
    model = tiny.model()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(tiny, tmp_path, model=model, optimizers=(own, None))
    trainer.train()
    assert [len(group["params"]) for group in own.param_groups][1:] == [2]
    assert own.param_groups[1]["initial_lr"] == 1e-2


def test_metrics_are_counts(tiny, tmp_path):
    """A window of two steps weighs views and pairs, not steps; the reduction is a sum."""
    one = make_trainer(tiny, tmp_path, per_device_train_batch_size=4, max_steps=1)
    two = make_trainer(tiny, tmp_path, gradient_accumulation_steps=2, max_steps=1)
    for trainer in (one, two):
        trainer.train()
    for name in (*DEGREE_METRICS, "alignment_loss"):
        (first,), (second,) = history(one, f"spo/{name}"), history(two, f"spo/{name}")
        assert first == pytest.approx(second, abs=1e-6), name


def test_metrics_keep_every_pair(tiny, tmp_path):
    """The last accumulation window of an epoch is fetched whole; none of its pairs is lost."""
    trainer = make_trainer(
        tiny,
        tmp_path,
        train_dataset=tiny.dataset.select(range(7)),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        max_steps=-1,
    )
    pairs = []
    add = trainer._degree_metrics["train"].add
    trainer._degree_metrics["train"].add = lambda counts: pairs.append(len(counts)) or add(counts)
    trainer.train()
    assert pairs == [2, 2, 2, 1]


@pytest.mark.parametrize("view", ["hidden", "text"])
def test_streamed_evaluation(tiny, tmp_path, view):
    """A stream to evaluate on beside a map-style dataset to train on."""
    stream = IterableDataset.from_generator(lambda: iter(tiny.rows[:4]))
    trainer = make_trainer(tiny, tmp_path, view=view, eval_dataset=stream)
    assert "eval_spo/degree_loss" in trainer.evaluate()


def test_text_views_under_autocast():
    """Means of shortened responses stay fp32, whatever autocast says."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 40, 32, generator=generator)
    mask = torch.ones(4, 40, dtype=torch.int64)
    mask[1, 30:] = 0
    exact = pool_views(hidden.double().float(), mask, "mean")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool_views(hidden, mask, "mean"), exact)


def test_config_and_card(tiny, tmp_path):
    with pytest.raises(TypeError, match="args must be an SPOConfig, got DPOConfig"):
        SPOTrainer(
            model=tiny.path,
            args=arguments(tmp_path, DPOConfig),
            train_dataset=tiny.dataset,
            processing_class=tiny.tokenizer,
        )
    trainer = make_trainer(tiny, tmp_path)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "SPO" in card and "2409.17791" in card


@pytest.mark.parametrize("view", ["hidden", "text"])
def test_evaluate(tiny, tmp_path, view):
    """Logits for compute_metrics come from a call without degree inputs; new datasets work too."""
    shapes = []
    trainer = make_trainer(
        tiny,
        tmp_path,
        view=view,
        dataset_num_proc=2,
        compute_metrics=lambda result: shapes.append(result.predictions.shape) or {"seen": 1.0},
    )
    metrics = trainer.evaluate(tiny.dataset.select(range(4)))
    assert metrics["eval_seen"] == 1.0 and "eval_spo/degree_loss" in metrics
    assert shapes[0][0] == 8 and shapes[0][2] == len(tiny.tokenizer)


def test_other_collator(tiny, tmp_path):
    collator = DataCollatorForPreference(pad_token_id=0)
    trainer = make_trainer(tiny, tmp_path, data_collator=collator)
    with pytest.raises(ValueError, match=r"batch must have removal_levels, got \['attention_mask'"):
        trainer.train()


def test_refused(tiny, tmp_path):
    def refused(match, **arguments_):
        with pytest.raises(NotImplementedError, match=match):
            make_trainer(tiny, tmp_path, **arguments_)

    prompt_tuning = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    reason = "PROMPT_TUNING is not supported: it puts virtual tokens before the text"
    refused(reason, peft_config=prompt_tuning)
    refused(reason, model=get_peft_model(tiny.model(), prompt_tuning))
    reason = "vision-language models are not supported: processors expand images into tokens"
    pictures = Dataset.from_list([{**row, "images": ["a.png"]} for row in tiny.rows[:2]])
    refused(reason, train_dataset=pictures)
    model = tiny.model()
    model.config.vision_config = {}
    refused(reason, model=model)


def test_refused_settings(tiny, tmp_path):
    def refused(match, **arguments_):
        with pytest.raises(ValueError, match=match):
            make_trainer(tiny, tmp_path, **arguments_)

    refused(
        "logprob_budget_mib must hold at least one row of log-probs, got 1e-05 MiB",
        logprob_budget_mib=1e-5,
    )
    refused("kernel_backend='triton' must run on a CUDA device, got cpu", kernel_backend="triton")
    refused("dispatch_batches must be off", accelerator_config={"dispatch_batches": True})
    refused("must keep at least one row whose prompt is shorter than max_length=2", max_length=2)
    refused("label_smoothing of exo_pair must be a finite number > 0.0", loss_type="exo_pair")
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    refused("must leave the scheduler", model=model, optimizers=(optimizer, scheduler))
