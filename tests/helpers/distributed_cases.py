"""Models and trainers that the tests in several processes share."""

from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from spo_kernels.integrations import SPOTrainer
from tests.helpers.trl_tiny import Tiny, arguments

V = 61
# patched trainers, with settings whose loss is no NaN where nothing is scored
TRL = {"dpo": {}, "cpo": {"cpo_alpha": 0.0, "loss_type": "sigmoid"}}
SPO_STEPS = 3


def make_model(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def in_order(trainer: Trainer) -> Trainer:
    """Take the rows in order, so that each process knows which it gets."""
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    return trainer


def half_empty_rows(tiny: Tiny) -> Dataset:
    """Every second pair, and so every batch of the second process, has no key content."""
    empty = {side: [{"role": "assistant", "content": "It is."}] for side in ("chosen", "rejected")}
    return Dataset.from_list(
        [{**row, **(empty if i % 2 else {})} for i, row in enumerate(tiny.rows)]
    )


def make_spo_trainer(tiny: Tiny, folder: Path, *, batch_size: int, **settings) -> SPOTrainer:
    trainer = SPOTrainer(
        model=tiny.path,
        args=arguments(
            folder,
            max_steps=SPO_STEPS,
            per_device_train_batch_size=batch_size,
            logging_steps=SPO_STEPS,
            ddp_find_unused_parameters=False,
            **settings,
        ),
        train_dataset=half_empty_rows(tiny),
        processing_class=tiny.tokenizer,
    )
    return in_order(trainer)
