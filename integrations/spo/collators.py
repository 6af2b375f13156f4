"""Batches of TRL's KTO, CPO and ORPO trainers with what the degree loss reads in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DataCollator

from spo_kernels import PreferenceCollator
from spo_kernels.integrations.spo.key_content_dataset import key_content_columns


@dataclass
class UnpairedDegreeCollator:
    """KTO's batch, its KL sequences and labels included, with levels or views of the responses."""

    trl: DataCollator
    degree: PreferenceCollator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**self.trl(examples), **self.degree(examples)}


@dataclass
class PairDegreeCollator:
    """CPO's and ORPO's batch, its two sides padded alike, with levels or views of the responses.

    ``degree`` must not cut the sequences: they were cut when they were tokenized.
    """

    trl: DataCollator
    degree: PreferenceCollator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        added = key_content_columns(self.degree.view)
        batch = self.trl([{k: v for k, v in row.items() if k not in added} for row in examples])
        degree = self.degree(examples)
        # ORPO scores the prompts of chosen responses as well
        del degree["scored_rows"]
        ids, attention_mask = degree.pop("input_ids"), degree.pop("attention_mask")
        labels = ids.masked_fill(degree["completion_mask"] == 0, -100)
        sequences = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
        for name, both in sequences.items():
            batch[f"chosen_{name}"], batch[f"rejected_{name}"] = both.chunk(2)
        return {**batch, **degree}
