"""One training step (forward, loss, backward) of stock TRL DPO and of ours, on the same batch.

Models are made from a config with random weights; ``spo gamma=0`` is DPO through our log-probs, and
what ``spo`` costs more than it is SPO's own cost.
"""

import dataclasses
import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|turn|>' + message['content'] + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|turn|>' }}{%- endif -%}"
)
_SPECIAL = ["<|pad|>", "<|turn|>", "<|end|>"]
_NOUNS = "lamp river stone cloud engine window garden letter market bridge".split()
_FILLERS = "the and of with under is by on in to".split()
_PROMPT_WORDS = 8

TRAINERS = ("trl", "spo gamma=0", "spo")


@dataclasses.dataclass(frozen=True)
class StepShape:
    """A model from a config, and the batch it is stepped on."""

    name: str
    hidden: int
    layers: int
    vocab: int
    pairs: int
    response_words: int
    dtype: str = "float32"
    lora: bool = False

    @property
    def workload(self) -> str:
        kind = "lora" if self.lora else "full"
        return f"step-{self.name}-{kind}-{self.pairs}x{self.response_words}"


TINY_STEP = StepShape("tiny", 32, 1, 600, 2, 16)
CPU_STEP = StepShape("cpu", 256, 2, 32000, 4, 128)


def gpu_steps(*, long: bool) -> list[StepShape]:
    """Return the end-to-end shapes: a 1B-class model, and with ``long`` an 8B-class one and 32k."""
    small = StepShape("1b", 2048, 16, 128256, 1, 4096, "bfloat16")
    steps = [small, dataclasses.replace(small, lora=True)]
    if long:
        steps.append(dataclasses.replace(small, response_words=16384, lora=True))
        steps.append(StepShape("8b", 4096, 32, 128256, 1, 4096, "bfloat16", lora=True))
    return steps


def why_not(shape: StepShape) -> str | None:
    """Return why the steps of a shape cannot be made here, or None."""
    modules = {"trl": "trl", "datasets": "datasets", "RAKE": "python-rake"}
    if shape.lora:
        modules["peft"] = "peft"
    for module, package in modules.items():
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
    if importlib.util.find_spec("spo_kernels.integrations") is None:
        return "spo_kernels.integrations is not installed, see CONTRIBUTING.md"
    return None


def make_step(kind: str, shape: StepShape, folder: Path) -> tuple[Callable[[], Any], int]:
    """Return a function that runs one step of a trainer, and the batch's tokens.

    ``folder`` holds the saved model, made by the first call: every trainer starts from it.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from spo_kernels.integrations import SPOConfig, SPOTrainer

    rows = _made_pairs(shape)
    if not (folder / "config.json").exists():
        _save_model(shape, rows, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    dtype = getattr(torch, shape.dtype)
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": shape.pairs,
        "max_length": None,
        "precompute_ref_log_probs": False,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
    }
    gamma = {"spo": {"gamma": 0.1}, "spo gamma=0": {"gamma": 0.0}}.get(kind, {})
    config_class, trainer_class = (
        (DPOConfig, DPOTrainer) if kind == "trl" else (SPOConfig, SPOTrainer)
    )
    peft_config = None
    if shape.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    reference = None if shape.lora else AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        ref_model=reference,
        args=config_class(**settings, **gamma),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def step() -> torch.Tensor:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        trainer.model.zero_grad()
        return loss

    return step, int(batch["attention_mask"].sum())


def _made_pairs(shape: StepShape) -> list[dict[str, Any]]:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choice(draw.choice((_NOUNS, _FILLERS))) for _ in range(count))

    return [
        {
            "prompt": [{"role": "user", "content": words(_PROMPT_WORDS)}],
            "chosen": [{"role": "assistant", "content": words(shape.response_words)}],
            "rejected": [{"role": "assistant", "content": words(shape.response_words)}],
        }
        for _ in range(shape.pairs)
    ]


def _save_model(shape: StepShape, rows: list[dict[str, Any]], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [row[side][0]["content"] for row in rows for side in ("prompt", "chosen", "rejected")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(shape.vocab, 600),
        special_tokens=_SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(2, shape.hidden // 128),
        num_key_value_heads=max(1, shape.hidden // 512),
        max_position_embeddings=4 * shape.response_words + 256,
        tie_word_embeddings=False,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    # drawing billions of weights takes a CPU minutes
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, shape.dtype)).save_pretrained(folder)
    fast.save_pretrained(folder)
