"""``SPOCPOTrainer`` and ``SPOORPOTrainer``: the degree loss beside TRL's CPO and ORPO."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from trl.data_utils import maybe_extract_prompt
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import global_then_local_main_first

from spo_kernels.integrations.lm_head.fused_head import FusedHeadSettings
from spo_kernels.integrations.spo.collators import PairDegreeCollator
from spo_kernels.integrations.spo.key_content_dataset import map_key_content
from spo_kernels.integrations.spo.mixin import SPOTrainerMixin
from spo_kernels.integrations.spo.pair_config import SPOCPOConfig, SPOORPOConfig
from spo_kernels.integrations.spo.policy_call import without_added
from spo_kernels.integrations.trl_patch.init import mark_fused_head
from spo_kernels.integrations.trl_patch.pairs import PAIR_OUTPUTS, cpo_forward, orpo_forward

# columns of a row that TRL renders and tokenizes
_RAW_COLUMNS = ("prompt", "chosen", "rejected", "chat_template_kwargs")


class _PairTrainer(SPOTrainerMixin):
    """Shared by TRL's trainers without a reference model, which tokenize while they are built."""

    @contextmanager
    def _built_by_trl(self, given: dict[str, Any], settings: FusedHeadSettings) -> Iterator[None]:
        yield
        mark_fused_head(self, PAIR_OUTPUTS, settings)
        if self.args.gamma > 0:
            self.train_dataset = self._with_key_content("train", given["train_dataset"])
            if self.eval_dataset is not None:
                self.eval_dataset = self._with_key_content("eval", given["eval_dataset"])

    def _with_key_content(self, name: str, raw: Dataset) -> Dataset:
        """Add what the collator needs to the rows that TRL made of ``raw``, one of each."""
        rows = getattr(self, f"{name}_dataset")
        settings = self._key_content_settings(self.args, self.processing_class)
        workers = self.args.dataset_num_proc
        with global_then_local_main_first():
            # TRL has put rendered text in the place of the messages
            raw = raw.map(maybe_extract_prompt, num_proc=workers)
            raw = raw.select_columns([name for name in _RAW_COLUMNS if name in raw.column_names])
            ids = rows.map(_ids_of_sides, remove_columns=rows.column_names, num_proc=workers)
            found = map_key_content(
                concatenate_datasets([raw, ids], axis=1),
                name,
                pair_length=self.max_length,
                **settings,
            )
        return concatenate_datasets([rows, found.remove_columns(raw.column_names)], axis=1)

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        policy = self._policy_call(model, batch)
        loss, metrics = super().get_batch_loss_metrics(policy, without_added(batch), train_eval)
        return self._with_degree_loss(loss, policy), metrics

    def _degree_collator(self) -> PairDegreeCollator:
        return PairDegreeCollator(self.data_collator, self._preference_collator())


def _ids_of_sides(row: dict[str, Any]) -> dict[str, list[int]]:
    """Return prompt and response of each side of a row that CPO or ORPO has tokenized."""
    columns = {}
    for side in ("chosen", "rejected"):
        ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
        start = labels.count(-100)
        columns[f"{side}_prompt_ids"], columns[f"{side}_ids"] = ids[:start], ids[start:]
    return columns


class SPOCPOTrainer(_PairTrainer, CPOTrainer):
    """Train with ``alignment loss + gamma * (L_chosen + L_rejected)`` and no reference model.

    The alignment loss is CPOTrainer's own: CPO, SimPO, AlphaPO and its other loss types, scored on
    a fused head without logits. L is that of ``SPOTrainer``. Arguments are CPOTrainer's; ``args``
    is an ``SPOCPOConfig``, ``processing_class`` a fast tokenizer.

    Raises:
        ValueError, TypeError, NotImplementedError: a model, dataset or setting that cannot be
            trained, before training.
    """

    _tag_names = ["trl", "spo", "cpo"]
    _name = "SPO-CPO"
    _config = SPOCPOConfig
    concatenated_forward = cpo_forward(CPOTrainer.concatenated_forward)


class SPOORPOTrainer(_PairTrainer, ORPOTrainer):
    """Train with ``alignment loss + gamma * (L_chosen + L_rejected)`` and no reference model.

    The alignment loss is ORPOTrainer's own, scored on a fused head without logits. L is that of
    ``SPOTrainer``. Arguments are ORPOTrainer's; ``args`` is an ``SPOORPOConfig``,
    ``processing_class`` a fast tokenizer.

    Raises:
        ValueError, TypeError, NotImplementedError: a model, dataset or setting that cannot be
            trained, before training.
    """

    _tag_names = ["trl", "spo", "orpo"]
    _name = "SPO-ORPO"
    _config = SPOORPOConfig
    concatenated_forward = orpo_forward(ORPOTrainer.concatenated_forward)
