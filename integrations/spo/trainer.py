"""``SPOTrainer`` and ``SPOKTOTrainer``: the degree loss beside TRL's DPO and KTO."""

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOTrainer, KTOTrainer
from trl.trainer import dpo_trainer, kto_trainer
from trl.trainer.utils import global_then_local_main_first

from spo_kernels import PreferenceCollator
from spo_kernels.integrations.lm_head.fused_head import FusedHeadSettings, fused_heads_installed_in
from spo_kernels.integrations.spo.collators import UnpairedDegreeCollator
from spo_kernels.integrations.spo.config import SPOConfig, SPOKTOConfig, SPOSettings
from spo_kernels.integrations.spo.key_content_dataset import key_content_columns, map_key_content
from spo_kernels.integrations.spo.mixin import SPOTrainerMixin
from spo_kernels.integrations.spo.policy_call import PolicyCall, without_added


class _ReferenceTrainer(SPOTrainerMixin):
    """Shared by TRL's trainers with a reference model: dataset, collation, fused head, loss."""

    # whose ``add_fused_lm_head`` the trainer calls
    _module: ModuleType

    def _built_by_trl(
        self, given: dict[str, Any], settings: FusedHeadSettings
    ) -> AbstractContextManager[None]:
        return fused_heads_installed_in(self._module, settings)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: SPOSettings,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if args.gamma == 0:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        settings = self._key_content_settings(args, processing_class)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(
                f"{type(self).__name__}: the {dataset_name} dataset must keep at least one row "
                f"whose prompt is shorter than max_length={args.max_length}, got none"
            )
        with global_then_local_main_first():
            return map_key_content(dataset, dataset_name, **settings)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            if self.args.gamma > 0:
                self._signature_columns += list(key_content_columns(self.args.view, self._sides))

    def compute_ref_log_probs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().compute_ref_log_probs(model, without_added(inputs))

    def _compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        policy = self._policy_call(model, inputs)
        result = super()._compute_loss(policy, without_added(inputs), return_outputs)
        if not return_outputs:
            return self._with_degree_loss(result, policy)
        loss, outputs = result
        return self._with_degree_loss(loss, policy), outputs


class SPOTrainer(_ReferenceTrainer, DPOTrainer):
    """Train with ``alignment loss + gamma * (L_chosen + L_rejected)``.

    The alignment loss is DPOTrainer's own; L is the mean over that side's responses of the degree
    loss of ``spo_kernels.degree_loss``, where a response without key content counts as 0. Arguments
    are DPOTrainer's; ``args`` is an ``SPOConfig``, ``processing_class`` a fast tokenizer, and a
    ``data_collator`` of your own has to return what ``spo_kernels.PreferenceCollator`` returns.

    Raises:
        ValueError, TypeError, NotImplementedError: a model, dataset or setting that cannot be
            trained, before training.
    """

    _tag_names = ["trl", "spo"]
    _name = "SPO"
    _config = SPOConfig
    _module = dpo_trainer

    def _degree_collator(self) -> PreferenceCollator:
        return self._preference_collator(
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
        )


class SPOKTOTrainer(_ReferenceTrainer, KTOTrainer):
    """Train with ``alignment loss + gamma * L`` on single responses that are desirable or not.

    The alignment loss is KTOTrainer's own, its estimate of the KL divergence included, whose
    forward pass has no part in the degree loss. L is the mean degree loss over all responses of the
    batch, desirable and undesirable alike: one response counts as much as another, and
    ``desirable_weight`` and ``undesirable_weight`` do not weigh it. For a batch of as many of one
    kind as of the other that is half of SPOTrainer's ``L_chosen + L_rejected``.

    Arguments are KTOTrainer's; ``args`` is an ``SPOKTOConfig``, ``processing_class`` a fast
    tokenizer, and a ``data_collator`` of your own has to return what ``UnpairedDegreeCollator`` of
    ``spo_kernels.integrations.degree_collators`` returns.

    Raises:
        ValueError, TypeError, NotImplementedError: a model, dataset or setting that cannot be
            trained, before training.
    """

    _tag_names = ["trl", "spo", "kto"]
    _name = "SPO-KTO"
    _config = SPOKTOConfig
    _module = kto_trainer
    _sides = ("completion",)

    def _compute_kl_logps(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor | None:
        # its sequences are none of those that the degree loss reads
        plain = model.model if isinstance(model, PolicyCall) else model
        return super()._compute_kl_logps(plain, batch)

    def _degree_collator(self) -> UnpairedDegreeCollator:
        degree = self._preference_collator(
            max_length=self.args.max_length, pad_to_multiple_of=self.args.pad_to_multiple_of
        )
        return UnpairedDegreeCollator(self.data_collator, degree)
