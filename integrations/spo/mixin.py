"""``SPOTrainerMixin``: the preference-degree loss beside the loss of a TRL alignment trainer."""

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from accelerate.utils.deepspeed import DummyOptim
from torch import nn
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SyncRefModelCallback
from trl.trainer.utils import get_config_model_id

from spo_kernels import PreferenceCollator, smart_stop_words
from spo_kernels.integrations.lm_head.fused_head import DEGREE_HEAD, FusedHeadSettings
from spo_kernels.integrations.spo.checks import (
    check_budget,
    refuse_engine,
    refuse_settings,
    refuse_unsupported,
)
from spo_kernels.integrations.spo.config import SPOSettings
from spo_kernels.integrations.spo.degree_head import DegreeHead
from spo_kernels.integrations.spo.degree_metrics import DegreeMetrics, row_counts
from spo_kernels.integrations.spo.head_checkpoint import load_head, require_head, save_head
from spo_kernels.integrations.spo.key_content_dataset import check_tokenizer
from spo_kernels.integrations.spo.policy_call import PolicyCall

_MIB = 1024**2


class SPOTrainerMixin:
    """Comes before a trainer of TRL among the bases and adds ``gamma * L`` to its loss.

    ``L`` is the sum over ``_sides`` of the mean degree loss of that side's responses. A subclass
    says how its trainer takes the fused head, tokenizes and collates. Arguments are the trainer's.
    """

    _config: type[SPOSettings]
    # the responses of a row; a batch holds those of the first side first
    _sides: tuple[str, ...] = ("chosen", "rejected")
    _paper = {
        "title": "Self-supervised Preference Optimization: Enhance Your Language Model with "
        "Preference Degree Awareness",
        "id": "2409.17791",
    }

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if issubclass(cls, Trainer):
            kinds = (kind for kind in cls.__mro__ if not issubclass(kind, SPOTrainerMixin))
            cls.__signature__ = inspect.signature(next(kinds))

    def __init__(self, *positional: Any, **named: Any) -> None:
        call = inspect.signature(super().__init__).bind(*positional, **named)
        given = call.arguments
        model = given.get("model")
        if given.get("args") is None and model is not None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            given["args"] = self._config(f"{name.split('/')[-1]}-{self._name}")
        args, op = given.get("args"), type(self).__name__
        if not isinstance(args, self._config):
            raise TypeError(
                f"{op}: args must be an {self._config.__name__}, got {type(args).__name__}"
            )
        refuse_unsupported(
            op,
            model,
            given.get("processing_class"),
            given.get("train_dataset"),
            given.get("peft_config"),
        )
        if args.gamma > 0:
            refuse_settings(op, args, given.get("optimizers", (None, None)))
            # a dispatched batch is cut to the same length in every tensor, offsets included
            args.accelerator_config.dispatch_batches = False
        budget = args.logprob_budget_mib
        settings = FusedHeadSettings(
            budget_bytes=None if budget is None else int(budget * _MIB),
            backend=args.kernel_backend,
            pooling=args.pooling,
        )
        with self._built_by_trl(given, settings):
            super().__init__(*call.args, **call.kwargs)
        refuse_unsupported(op, self.model, self.processing_class, None, None)
        refuse_engine(op, self)
        check_budget(args, settings, self._pretrained_model().get_output_embeddings())
        self._degree_metrics = {mode: DegreeMetrics(len(self._sides)) for mode in ("train", "eval")}
        self._degree_head: DegreeHead | None = None
        if args.gamma > 0:
            self._install_degree_head()
            if given.get("data_collator") is None:
                self.data_collator = self._degree_collator()

    # -- what a subclass says

    def _built_by_trl(
        self, given: dict[str, Any], settings: FusedHeadSettings
    ) -> AbstractContextManager[None]:
        """Return the context in which TRL builds the trainer, after which it has fused heads."""
        raise NotImplementedError

    def _degree_collator(self) -> DataCollator:
        """Return the collator of the trainer's batches with levels or views in them."""
        raise NotImplementedError

    # -- set-up

    def _install_degree_head(self) -> None:
        """Add the head to the model: PEFT has wrapped it by now, no engine has sharded it yet."""
        model = self._pretrained_model()
        lm_head = model.get_output_embeddings()
        self._degree_head = DegreeHead(
            lm_head.in_features,
            self.args.num_degrees,
            share=self.args.share_degree_head,
            center_views=self.args.center_views,
            backend=self.args.kernel_backend,
            device=lm_head.weight.device,
        )
        setattr(model, DEGREE_HEAD, self._degree_head)
        names = {f"{DEGREE_HEAD}.{name}" for name, _ in self._degree_head.named_parameters()}
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *names}
        callback = self.pop_callback(SyncRefModelCallback)
        if callback is not None:
            self.add_callback(_SyncRefModelWithoutHead(callback.ref_model, callback.accelerator))

    def _pretrained_model(self) -> PreTrainedModel:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def _preference_collator(self, **settings: Any) -> PreferenceCollator:
        return PreferenceCollator(
            pad_token_id=self.processing_class.pad_token_id,
            view=self.args.view,
            sides=self._sides,
            **settings,
        )

    def _key_content_settings(
        self, args: SPOSettings, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """Return what ``map_key_content`` needs to know, refusing what it cannot work with."""
        op = type(self).__name__
        refuse_unsupported(op, None, tokenizer, None, None)
        check_tokenizer(tokenizer)
        # a list of the user's own, even an empty one, stands for every language
        stop_words = args.key_content_stop_words
        if stop_words is None:
            stop_words = smart_stop_words(args.key_content_language)
        return {
            "tokenizer": tokenizer,
            "num_degrees": args.num_degrees,
            "view": args.view,
            "stop_words": stop_words,
            "num_proc": args.dataset_num_proc,
            "sides": self._sides,
        }

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give the degree head a parameter group of its own: its learning rate, no weight decay."""
        if self._degree_head is None:
            return super().create_optimizer(model)
        head = list(self._degree_head.parameters())
        # frozen parameters stay out of the groups made there
        self._degree_head.requires_grad_(False)
        try:
            optimizer = super().create_optimizer(model)
        finally:
            self._degree_head.requires_grad_(True)
        if isinstance(optimizer, DummyOptim):
            raise NotImplementedError(
                f"{type(self).__name__}: the DeepSpeed configuration must not define an optimizer, "
                "since the degree head needs a parameter group of its own. Set `optim` in "
                f"{self._config.__name__} instead."
            )
        grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if id(head[0]) not in grouped:
            rate = self.args.degree_head_learning_rate
            optimizer.add_param_group({"params": head, "lr": rate, "weight_decay": 0.0})
        return optimizer

    # -- loss and metrics

    def _policy_call(self, model: nn.Module, inputs: dict[str, Any]) -> PolicyCall:
        return PolicyCall(model, inputs, with_degree=self._degree_head is not None)

    def _with_degree_loss(self, loss: torch.Tensor, policy: PolicyCall) -> torch.Tensor:
        """Return the alignment loss with the degree loss of the same forward, and count both."""
        output = policy.output
        num_rows = output.log_probs.size(0) // len(self._sides)
        counts = row_counts(
            loss,
            num_rows,
            output.degree_losses,
            output.degree_correct_views,
            output.degree_counted_views,
            output.degree_view_mask,
        )
        # an epoch's last window is fetched whole, and gather_for_metrics would cut every part of it
        # to the size of the last; rows that padded it were trained on, in evaluation they were not
        training = self.model.training
        gather = self.accelerator.gather if training else self.accelerator.gather_for_metrics
        self._degree_metrics["train" if training else "eval"].add(gather(counts))
        if output.degree_losses is None:
            return loss
        # the sum over the sides of each side's mean
        return loss + self.args.gamma * output.degree_losses.sum() / num_rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        metrics = self._degree_metrics[mode].pop()
        logs.update({f"{prefix}{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)

    # -- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # only checkpoints come with a folder: an upload of the final model is internal too
        if self._degree_head is not None and _internal_call and output_dir is not None:
            save_head(self._degree_head, output_dir, write=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # PEFT asks nobody which keys to leave out, and saves every bias with bias="all"
        if self._degree_head is not None and (state_dict is not None or is_peft_model(self.model)):
            state = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {k: v for k, v in state.items() if f"{DEGREE_HEAD}." not in k}
        super()._save(output_dir, state_dict)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        resumes = self._degree_head is not None and resume_from_checkpoint is not None
        if resumes:
            require_head(resume_from_checkpoint)
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if resumes:
            self._load_head(resume_from_checkpoint)
        return prepared

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._degree_head is not None:
            self._load_head(self.state.best_model_checkpoint)

    def _load_head(self, folder: str) -> None:
        # DeepSpeed restores it with its own master weights, from its own files
        if not self.is_deepspeed_enabled:
            load_head(self._degree_head, folder)


class _SyncRefModelWithoutHead(SyncRefModelCallback):
    """TRL's callback, for a policy that has one module more than its reference model."""

    @staticmethod
    def sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        head = model._modules.pop(DEGREE_HEAD)
        try:
            SyncRefModelCallback.sync_target_model(model, target_model, alpha)
        finally:
            model._modules[DEGREE_HEAD] = head
