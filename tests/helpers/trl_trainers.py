"""Every TRL trainer that scores tokens, tiny and on a CPU, and the run that compares two."""

import inspect
import queue
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.a2po import A2POConfig, A2POTrainer
from trl.experimental.async_grpo import (
    AsyncGRPOConfig,
    AsyncGRPOTrainer,
    async_grpo_trainer,
    packing,
)
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from tests.helpers.oracle import moved_by_order
from tests.helpers.trl_tiny import made_pairs, make_tokenizer, texts_of

# what a clock or the machine decides
UNCOMPARED = ("time", "runtime", "per_second", "perf/", "epoch")


def reward(completions, **_) -> list[float]:
    """Score a completion by its letters: varied, and the same in every process."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 7) / 7 for text in texts]


def any_reward(completions, **_) -> list[float]:
    """A2PO wants zeros and ones."""
    return [float(value > 0.4) for value in reward(completions)]


class Rollouts:
    """Rollouts for AsyncGRPO, drawn on the spot instead of by a vLLM server."""

    def __init__(self, data: "Data"):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        draw = np.random.default_rng(3)
        for group, row in enumerate(data.rows * 4):
            prompt = data.tokenizer(row["prompt"])["input_ids"]
            for text in (row["chosen"], row["rejected"]):
                ids = prompt + data.tokenizer(text)["input_ids"][:12]
                mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
                self.rollout_buffer.put(
                    RolloutSample(
                        prompt=[],
                        completion=[],
                        input_ids=np.array(ids),
                        completion_mask=np.array(mask),
                        old_log_probs=draw.normal(-5.0, 0.5, len(ids)).astype(np.float32),
                        advantage=float(draw.normal()),
                        model_version=0,
                        group_id=group,
                        metrics={"reward": 0.5},
                    )
                )

    def start(self): ...

    def stop(self): ...

    def update_model_version(self, model_version): ...

    def check_health(self, stale_after_s):
        raise AssertionError("there are no more rollouts")


class NoTransfer:
    """A weight transfer to nowhere."""

    def init_weight_transfer(self): ...

    def pause(self): ...

    def send_weights(self, iterator):
        list(iterator)

    def resume(self): ...

    def destroy(self): ...


def dense_varlen_attention(
    query, key, value, offsets_q, offsets_k, *_, softmax_scale, causal, window_size
):
    """Do what AsyncGRPO asks of FlashAttention 3, on a CPU."""
    assert causal and window_size == (-1, -1)
    outputs = []
    for i in range(len(offsets_q) - 1):
        q = query[offsets_q[i] : offsets_q[i + 1]].transpose(0, 1)
        k, v = (x[offsets_k[i] : offsets_k[i + 1]].transpose(0, 1) for x in (key, value))
        groups = len(q) // len(k)
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.transpose(1, 2) * softmax_scale
        rows, columns = scores.shape[1:]
        future = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


def attend_on_cpu(monkeypatch) -> None:
    """Let AsyncGRPO run without FlashAttention, a server, or a GPU whose speed it could look up."""
    stand_in = types.SimpleNamespace(flash_attn_varlen_func=dense_varlen_attention)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    monkeypatch.setattr(async_grpo_trainer, "VLLMClient", lambda *_: None)
    monkeypatch.setattr(packing, "_flash_attn", lambda: stand_in)


class Data:
    """Pairs of plain text, their tokenizer, and models of that vocabulary or a larger one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows = made_pairs(12, plain=True)
        self.tokenizer = make_tokenizer(texts_of(self.rows))
        self.pairs = Dataset.from_list(self.rows)
        self.prompts = self.pairs.select_columns("prompt")
        self.completions = self.pairs.select_columns(["prompt", "chosen"]).rename_column(
            "chosen", "completion"
        )
        unpaired = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in self.rows
            for side in ("chosen", "rejected")
        ]
        self.unpaired = Dataset.from_list(unpaired)
        references = [{**row, "reference": other["chosen"]} for row, other in self._neighbours()]
        self.triples = Dataset.from_list(references)

    def _neighbours(self):
        return zip(self.rows, self.rows[1:] + self.rows[:1], strict=True)

    def model(self, vocab_size: int | None = None) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab_size or len(self.tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            bos_token_id=None,
            initializer_range=0.2,
        )
        # from a folder, since a trainer loads its reference from where the policy came from
        folder = self.folder / f"model{config.vocab_size}"
        if not folder.exists():
            LlamaForCausalLM(config).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder)


@dataclass(frozen=True)
class Case:
    """How to build one trainer: its classes, its data set, what differs from ``settings``."""

    trainer: type
    config: type
    data: str = "pairs"
    settings: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    peft_in_constructor: bool = True


SAMPLED = {"max_completion_length": 8, "num_generations": 2, "temperature": 0.9}
CASES = {
    "dpo": Case(DPOTrainer, DPOConfig),
    "dpo_wpo": Case(DPOTrainer, DPOConfig, settings={"use_weighting": True}),
    "kto": Case(KTOTrainer, KTOConfig, "unpaired"),
    "sft": Case(SFTTrainer, SFTConfig, "completions"),
    "grpo": Case(
        GRPOTrainer,
        GRPOConfig,
        "prompts",
        {**SAMPLED, "beta": 0.1, "entropy_coef": 0.01, "num_iterations": 2, "epsilon": 2.0},
        {"reward_funcs": reward},
    ),
    "rloo": Case(
        RLOOTrainer,
        RLOOConfig,
        "prompts",
        {**SAMPLED, "beta": 0.1, "num_iterations": 2, "epsilon": 2.0},
        {"reward_funcs": reward},
    ),
    "async_grpo": Case(
        AsyncGRPOTrainer,
        AsyncGRPOConfig,
        "prompts",
        {"dtype": "float32", "token_budget": 0, "temperature": 0.9, "max_staleness": 1000},
    ),
    "cpo": Case(CPOTrainer, CPOConfig, settings={"max_length": 96}),
    "simpo": Case(
        CPOTrainer,
        CPOConfig,
        settings={"max_length": 96, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
    "alphapo": Case(
        CPOTrainer, CPOConfig, settings={"max_length": 96, "loss_type": "alphapo", "alpha": 0.5}
    ),
    "orpo": Case(ORPOTrainer, ORPOConfig, settings={"max_length": 96}),
    "tpo": Case(TPOTrainer, TPOConfig, "triples"),
    "tpo_l": Case(TPOTrainer, TPOConfig, "triples", {"loss_type": "tpo-l", "tpo_alpha": 0.0}),
    "online_dpo": Case(
        OnlineDPOTrainer,
        OnlineDPOConfig,
        "prompts",
        {"max_new_tokens": 8, "temperature": 0.9, "max_length": 24},
        {"reward_funcs": reward},
    ),
    "a2po": Case(
        A2POTrainer,
        A2POConfig,
        "prompts",
        {"max_completion_length": 8, "num_value_samples": 2, "filter_all_incorrect": False},
        {"reward_funcs": any_reward},
        peft_in_constructor=False,
    ),
}
# their fused head is TRL's own, which refuses an adapter on lm_head
FUSED = ("dpo", "dpo_wpo", "kto", "sft", "grpo", "rloo", "async_grpo")


def lora(*target_modules: str, dropout: float = 0.0) -> LoraConfig:
    """Return an adapter that is not zero at the start."""
    return LoraConfig(
        r=4,
        lora_alpha=16,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        init_lora_weights=False,
    )


def build(
    name: str,
    data: Data,
    folder: Path,
    adapter: LoraConfig | None = None,
    *,
    case: Case | None = None,
    vocab_size: int | None = None,
    steps: int = 10,
    ref_model: LlamaForCausalLM | None = None,
    eval_dataset: bool = False,
    **changes,
):
    """Build a trainer of ``CASES``, or ``case`` in its place, the same one every time."""
    case = case or CASES[name]
    values = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **case.settings,
        **changes,
    }
    model = data.model(vocab_size)
    inputs = dict(case.inputs)
    if ref_model is not None:
        inputs["ref_model"] = ref_model
    if eval_dataset:
        inputs["eval_dataset"] = getattr(data, case.data).select(range(4))
    if name == "async_grpo":
        inputs |= {"rollout_worker": Rollouts(data), "weight_transfer": NoTransfer()}
        model = str(model.name_or_path)
    torch.manual_seed(1)
    if adapter is not None and case.peft_in_constructor:
        inputs["peft_config"] = adapter
    elif adapter is not None:
        model = get_peft_model(model, adapter)
    if name == "a2po":
        data.tokenizer.padding_side = "left"
    return case.trainer(
        model=model,
        args=case.config(**values),
        train_dataset=getattr(data, case.data),
        processing_class=data.tokenizer,
        **inputs,
    )


@dataclass
class Record:
    """What a training run gave: the loss of each step, each step's metrics, the parameters."""

    losses: list[float]
    logs: list[dict[str, float]]
    parameters: dict[str, torch.Tensor]
    trained: set[str]


def train(trainer, resume_from: Path | None = None) -> Record:
    losses = []
    step = trainer.training_step

    def training_step(*args, **kwargs):
        losses.append(step(*args, **kwargs))
        return losses[-1]

    trainer.training_step = training_step
    torch.manual_seed(2)
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    logs = [
        {k: v for k, v in entry.items() if not any(word in k for word in UNCOMPARED)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    parameters = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    return Record([float(loss) for loss in losses], logs, parameters, trained)


# how far two runs may be apart where stock's own rounding takes it no further, see differences
LIMITS = {"loss": 1e-5, "metric": 1e-4, "frozen": 1e-6, "update": 1e-3}


def differences(
    found: Record, expected: Record, start: dict[str, torch.Tensor]
) -> dict[tuple[str, str], float]:
    """Return how far two runs are apart at most, by kind and name.

    Losses and metrics relative to the value plus 0.1, an update to its norm; a NaN stays one.
    """

    def relative(ours: list[float], theirs: list[float]) -> float:
        ours, theirs = torch.tensor(ours).double(), torch.tensor(theirs).double()
        return ((ours - theirs).abs() / (theirs.abs() + 0.1)).max().item()

    apart = {("loss", "loss"): relative(found.losses, expected.losses)}
    for name in {name for log in expected.logs for name in log}:
        values = [[log[name] for log in run.logs if name in log] for run in (found, expected)]
        apart["metric", name] = relative(*values)
    # some updates are zero in theory, a key bias's for one: the floor is the largest update's
    largest = max((expected.parameters[n] - start[n]).norm().item() for n in start)
    for name, before in start.items():
        difference = found.parameters[name] - expected.parameters[name]
        if name in found.trained:
            update = (expected.parameters[name] - before).norm().item()
            apart["update", name] = difference.norm().item() / (update + 1e-2 * largest)
        else:
            # AsyncGRPO merges its adapter into frozen weights and out of them again, which rounds
            apart["frozen", name] = difference.abs().max().item()
    return apart


def moved(trainer, seed: int):
    """Move what the trainer's model starts from by what the order of its sums can do."""
    parameters = dict(trainer.model.named_parameters())
    terms = max(size for p in parameters.values() for size in p.shape)
    with torch.no_grad():
        for name, value in moved_by_order(parameters, terms, seed).items():
            parameters[name].copy_(value)
    return trainer


def compare(
    found: Record,
    expected: Record,
    start: dict[str, torch.Tensor],
    steps: int = 10,
    stock: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """Check that two runs are equal to fp32 rounding; return the largest difference of each kind.

    Where a difference is over its limit, ``stock`` builds the trainer of ``expected`` again, which
    has to stray as far in one of four runs from parameters moved by rounding.
    """
    assert len(found.losses) == len(expected.losses) == steps
    assert len(found.logs) == len(expected.logs) > 0
    for ours, theirs in zip(found.logs, expected.logs, strict=True):
        assert ours.keys() == theirs.keys()
    apart = differences(found, expected, start)
    # a NaN is over
    over = {key: error for key, error in apart.items() if not error < LIMITS[key[0]]}
    if over and stock is not None:
        strays = [differences(train(moved(stock(), s)), expected, start) for s in range(4)]
        over = {k: error for k, error in over.items() if not error <= max(s[k] for s in strays)}
    assert not over, f"{over}: losses {found.losses} must be {expected.losses}"
    moves = [(expected.parameters[n] - start[n]).norm().item() for n in start if n in found.trained]
    assert max(moves) > 1e-4, "nothing was trained"
    return {
        kind: max((e for k, e in apart.items() if k[0] == kind), default=0.0) for kind in LIMITS
    }


def eager_fused_head(
    model,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Stand in for TRL's installer with full logits of the model's own forward: an oracle.

    The logits are PEFT's, so an adapter on lm_head counts.
    """
    plain = model.forward

    def forward(
        self,
        *args,
        fused_lm_head=False,
        labels=None,
        shift_labels=None,
        num_items_in_batch=None,
        **inputs,
    ):
        if not fused_lm_head:
            return plain(*args, **inputs)
        targets = labels[:, 1:] if shift_labels is None else shift_labels
        z = plain(*args, **inputs).logits[:, : targets.size(1)].float() / temperature
        mask = targets != -100
        targets = targets.clamp(min=0)
        logp = z.log_softmax(-1)
        found = {
            "log_probs": logp.gather(-1, targets[..., None])[..., 0],
            "entropy": -(logp.exp() * logp).sum(-1),
            "log_sum_sq_probs": (2 * logp).logsumexp(-1).detach(),
            "mean_logits": z.mean(-1).detach(),
            "is_top1": z.argmax(-1) == targets,
        }
        found = {
            name: value * mask if name in ("log_probs", *outputs) else None
            for name, value in found.items()
        }
        count = mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -found["log_probs"].sum() / count
        return FusedCausalLMOutput(loss=loss, label_mask=mask, **found)

    forward.__signature__ = inspect.signature(type(model).forward)
    model.forward = types.MethodType(forward, model)
