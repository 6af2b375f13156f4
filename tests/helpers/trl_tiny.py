"""Tiny tokenizers, models and preference pairs for the trainer tests, all made on the spot."""

import random
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spo_kernels.integrations import SPOConfig

TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|turn|>assistant\n' }}{%- endif -%}"
)
SPECIAL = ["<|pad|>", "<|turn|>", "<|end|>", "<unk>"]
NOUNS = "lamp river stone cloud engine window garden letter market bridge".split()
ADJECTIVES = "red quick silent old bright heavy small distant".split()


def made_pairs(count: int, *, seed: int = 0, plain: bool = False) -> list[dict]:
    """Return pairs of short sentences with key content in most responses."""
    draw = random.Random(seed)

    def noun_phrase() -> str:
        return f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"

    def response() -> str:
        phrases = [noun_phrase() for _ in range(draw.randint(2, 4))]
        return f"The {' is by the '.join(phrases)}. That is what it was."

    rows = []
    for _ in range(count):
        prompt, chosen, rejected = f"Where is the {noun_phrase()}?", response(), response()
        if plain:
            rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
        else:
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
    return rows


def texts_of(rows: list[dict]) -> list[str]:
    values = [row[name] for row in rows for name in ("prompt", "chosen", "rejected")]
    texts = [v for v in values if isinstance(v, str)]
    return texts + [m["content"] for v in values if isinstance(v, list) for m in v]


def make_tokenizer(texts: list[str], kind: str = "byte", vocab_size: int = 300):
    """Return a tokenizer of one of the three families: ``byte``, ``metaspace``, ``unigram``."""
    if kind == "byte":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        model = models.BPE(unk_token="<unk>") if kind == "metaspace" else models.Unigram()
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = []
    trainer_type = trainers.UnigramTrainer if kind == "unigram" else trainers.BpeTrainer
    arguments = {"unk_token": "<unk>"} if kind == "unigram" else {}
    trainer = trainer_type(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
        **arguments,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer, **changes) -> LlamaConfig:
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return LlamaConfig(vocab_size=len(tokenizer), **{**shape, **changes})


def save_model(
    folder: Path, tokenizer, *, seed: int = 0, config=None, kind=LlamaForCausalLM
) -> str:
    torch.manual_seed(seed)
    kind(config or tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def arguments(folder: Path, kind: type = SPOConfig, **changes):
    """Return quiet CPU settings: a few short steps, nothing saved."""
    values = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "max_length": 128,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return kind(**{**values, **changes})


def history(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Tiny:
    """Pairs, tokenizer and a saved model that belong together."""

    def __init__(self, folder: Path, *, plain: bool = False):
        self.rows = made_pairs(20, plain=plain)
        self.dataset = Dataset.from_list(self.rows)
        self.tokenizer = make_tokenizer(texts_of(self.rows))
        self.path = save_model(folder / "model", self.tokenizer)

    def model(self) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.path)
