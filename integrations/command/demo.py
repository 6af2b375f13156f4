"""`spo-kernels demo`: tokenizer, model, warm-up, SPO training and a report, all on a CPU."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from spo_kernels import Plan, linear_logprob
from spo_kernels.integrations import SPOConfig, SPOTrainer
from spo_kernels.integrations.command.demo_report import (
    Curve,
    compare_memory,
    curve,
    draw_curves,
    summary_table,
)
from spo_kernels.integrations.command.model_from_config import (
    save_random_model,
    tiny_config,
    train_tokenizer,
)
from spo_kernels.integrations.data.preference_data import load_pairs, texts_of

PAIRS = Path(__file__).with_name("demo_pairs.jsonl")
HELD_OUT_PAIRS = 8
VOCAB_SIZE = 2048
WARM_UP_STEPS = 80
SPO_STEPS = 40
MIB = 1024**2


def run(output_dir: Path, *, seed: int = 0) -> None:
    """Train, then write ``curves.png`` and ``model/`` to ``output_dir`` and print the table."""
    started = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    # a second thread gains seconds on tensors this small, and loses minutes on a busy machine
    torch.set_num_threads(1)
    set_seed(seed)
    console = Console()
    output_dir.mkdir(parents=True, exist_ok=True)
    initial, final = output_dir / "initial_model", output_dir / "model"

    pairs = load_pairs(str(PAIRS), split="train")
    held_out = pairs.select(range(len(pairs) - HELD_OUT_PAIRS, len(pairs)))
    training = pairs.select(range(len(pairs) - HELD_OUT_PAIRS))
    tokenizer = train_tokenizer(texts_of(training), vocab_size=VOCAB_SIZE)
    save_random_model(tiny_config(VOCAB_SIZE), tokenizer, initial, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(initial)
    console.print(
        f"{len(training)} pairs to train on, {len(held_out)} held out; "
        f"vocabulary {len(tokenizer)}, {model.num_parameters() / 1e6:.1f} million parameters"
    )

    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        batches = warm_up_batches(training, tokenizer, seed=seed)
        bar = progress.add_task("warm-up", total=WARM_UP_STEPS)
        warm_up_curve = warm_up(model, batches, on_step=lambda: progress.advance(bar))
        # the reference model is what training starts from, and TRL loads it by path
        model.save_pretrained(initial)

        trainer = make_trainer(initial, final, training, held_out, seed=seed)
        bar = progress.add_task("SPO", total=SPO_STEPS)
        trainer.add_callback(_OnStep(lambda: progress.advance(bar)))
        trainer.train()
    trainer.save_model(final)

    history = trainer.state.log_history
    picture = output_dir / "curves.png"
    draw_curves(warm_up_curve, history, picture)
    memory = compare_memory(*head_inputs(trainer.model, pairs, tokenizer))
    console.print(summary_table(list(_rows(history, memory))))
    console.print(
        f"curves {picture}\nmodel  {final}  (AutoModelForCausalLM.from_pretrained loads it)"
    )
    console.print(f"{time.perf_counter() - started:.0f} seconds on one thread")


def warm_up_batches(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, *, seed: int, batch_size: int = 16
) -> Iterator[torch.Tensor]:
    """Yield token ids ``[B, T]`` of both sides of the pairs, reshuffled each time round."""
    conversations = [
        tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"]
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(conversations), generator=generator).tolist()
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = [torch.tensor(conversations[i]) for i in order[start : start + batch_size]]
            yield pad_sequence(chosen, batch_first=True, padding_value=tokenizer.pad_token_id)


def warm_up(
    model: PreTrainedModel, batches: Iterator[torch.Tensor], *, on_step: Callable[[], None]
) -> Curve:
    """Train ``model`` as a language model for ``WARM_UP_STEPS`` and return the loss curve."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    steps, losses = [], []
    model.train()
    for step in range(1, WARM_UP_STEPS + 1):
        ids = next(batches)
        hidden = model.base_model(ids, attention_mask=ids != model.config.pad_token_id)[0]
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == model.config.pad_token_id, -100)
        logps = linear_logprob(hidden[:, :-1], model.get_output_embeddings().weight, labels).logps
        loss = -logps.sum() / (labels != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(float(step))
        losses.append(loss.item())
        on_step()
    return steps, losses


def make_trainer(
    initial: Path, final: Path, training: Dataset, held_out: Dataset, *, seed: int
) -> SPOTrainer:
    """Return a quiet SPOTrainer that starts from the model in ``initial``."""
    args = SPOConfig(
        output_dir=str(final),
        max_steps=SPO_STEPS,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=5e-5,
        gamma=0.5,
        # few pairs are enough for a head that sees the views of a response beside each other
        center_views=True,
        gradient_checkpointing=False,
        max_length=256,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=seed,
    )
    trainer = SPOTrainer(
        model=str(initial), args=args, train_dataset=training, eval_dataset=held_out
    )
    # one progress bar is enough
    trainer.remove_callback(PrinterCallback)
    return trainer


def head_inputs(
    model: PreTrainedModel, pairs: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the LM head reads for every token of the pairs: hidden, weight, labels."""
    count = 2 * len(pairs)
    ids = next(warm_up_batches(pairs, tokenizer, seed=0, batch_size=count))
    kept = ids[:, 1:] != tokenizer.pad_token_id
    with torch.no_grad():
        hidden = model.base_model(ids, attention_mask=ids != tokenizer.pad_token_id)[0]
    return hidden[:, :-1][kept], model.get_output_embeddings().weight, ids[:, 1:][kept]


class _OnStep(TrainerCallback):
    """Calls a function after every optimizer step."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
        self.function()


def _rows(
    history: list[dict[str, float]], memory: tuple[int, int, Plan]
) -> Iterator[tuple[str, str, str]]:
    def last(key: str) -> float:
        return curve(history, key)[1][-1]

    fused, eager, plan = memory
    losses = curve(history, "spo/alignment_loss")[1]
    yield (
        "alignment loss",
        f"{losses[0]:.3f} -> {losses[-1]:.3f}",
        f"held out {last('eval_spo/alignment_loss'):.3f}",
    )
    yield (
        "reward accuracy",
        f"{last('rewards/accuracies'):.2f}",
        f"held out {last('eval_rewards/accuracies'):.2f}",
    )
    yield (
        "degree accuracy",
        f"{last('spo/degree_accuracy'):.2f}",
        f"held out {last('eval_spo/degree_accuracy'):.2f}, "
        f"chance {last('eval_spo/degree_chance'):.2f}",
    )
    yield (
        "peak memory of the loss",
        f"{fused / MIB:.1f} MiB",
        f"eager logits {eager / MIB:.1f} MiB",
    )
    yield (
        "strategy",
        plan.strategy,
        f"{plan.rows} tokens, workspace {plan.budget_bytes / MIB:.0f} MiB",
    )
