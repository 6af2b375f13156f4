"""``SPOTrainer``: TRL's DPOTrainer with the preference-degree loss beside the alignment loss."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from accelerate.utils.deepspeed import DummyOptim
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import DPOTrainer, SyncRefModelCallback
from trl.trainer.utils import get_config_model_id, global_then_local_main_first

from spo_kernels import PreferenceCollator, plan_linear_logprob, smart_stop_words

from .degree_head import DegreeHead
from .degree_metrics import DegreeMetrics, pair_counts
from .fused_head import (
    DEGREE_HEAD,
    FusedHeadSettings,
    fused_heads_installed_by_dpo_trainer,
)
from .head_checkpoint import load_head, require_head, save_head
from .key_content_dataset import check_tokenizer, key_content_columns, map_key_content
from .policy_call import PolicyCall, without_added
from .trl_config import SPOConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_MIB = 1024**2


class SPOTrainer(DPOTrainer):
    """Train with ``alignment loss + gamma * (L_chosen + L_rejected)``.

    The alignment loss is DPOTrainer's own; L is the mean over that side's responses of the degree
    loss of ``spo_kernels.degree_loss``, where a response without key content counts as 0. Arguments
    are DPOTrainer's; ``args`` is an ``SPOConfig``, ``processing_class`` a fast tokenizer, and a
    ``data_collator`` of your own has to return what ``spo_kernels.PreferenceCollator`` returns.

    Raises: ValueError, TypeError, NotImplementedError for what cannot be trained, before training.
    """

    _tag_names = ["trl", "spo"]
    _name = "SPO"
    _paper = {
        "title": "Self-supervised Preference Optimization: Enhance Your Language Model with "
        "Preference Degree Awareness",
        "id": "2409.17791",
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: SPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: "PeftConfig | None" = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SPOConfig(f"{name.split('/')[-1]}-SPO")
        if not isinstance(args, SPOConfig):
            raise TypeError(f"SPOTrainer: args must be an SPOConfig, got {type(args).__name__}")
        _refuse_unsupported(model, processing_class, train_dataset, peft_config)
        if args.gamma > 0:
            _refuse_settings(args, optimizers)
            # a dispatched batch is cut to the same length in every tensor, offsets included
            args.accelerator_config.dispatch_batches = False
        budget = args.logprob_budget_mib
        settings = FusedHeadSettings(
            budget_bytes=None if budget is None else int(budget * _MIB),
            backend=args.kernel_backend,
            pooling=args.pooling,
        )
        with fused_heads_installed_by_dpo_trainer(settings):
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        _refuse_unsupported(self.model, self.processing_class, None, None)
        self._check_engine()
        self._check_budget(settings)
        self._degree_metrics = {"train": DegreeMetrics(), "eval": DegreeMetrics()}
        self._degree_head: DegreeHead | None = None
        if args.gamma > 0:
            self._install_degree_head()
            if data_collator is None:
                self.data_collator = PreferenceCollator(
                    pad_token_id=self._tokenizer.pad_token_id,
                    view=args.view,
                    max_length=args.max_length,
                    truncation_mode=args.truncation_mode,
                    pad_to_multiple_of=args.pad_to_multiple_of,
                )

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
        if self.args.sync_ref_model:
            callback = self.pop_callback(SyncRefModelCallback)
            self.add_callback(_SyncRefModelWithoutHead(callback.ref_model, callback.accelerator))

    def _pretrained_model(self) -> PreTrainedModel:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def _check_engine(self) -> None:
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version < 2:
            raise NotImplementedError(
                "SPOTrainer: fsdp_version must be 2, got 1, which flattens the degree head into "
                "the model's parameters so that it cannot be saved apart."
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and max(parallelism.cp_size, parallelism.sp_size) > 1:
            raise NotImplementedError(
                "SPOTrainer: context and sequence parallelism must be off: a response's views and "
                "its next-token labels need the whole sequence."
            )

    def _check_budget(self, settings: FusedHeadSettings) -> None:
        """Refuse a budget in which not even one row fits, before the first step."""
        if settings.budget_bytes is None:
            return
        device = "cpu"
        if self.args.device.type == "cuda" and settings.backend != "torch":
            major, minor = torch.cuda.get_device_capability(self.args.device)
            device = f"cuda:sm_{major}{minor}"
        lm_head = self._pretrained_model().get_output_embeddings()
        question = {
            "rows": 1,
            "hidden_size": lm_head.in_features,
            "vocab_size": lm_head.out_features,
            "dtype": lm_head.weight.dtype,
            "needs_grad": ("hidden", "weight") if lm_head.weight.requires_grad else ("hidden",),
            "outputs": ("logps", "entropy", "mean_logits", "is_top1"),
            "device": device,
        }
        try:
            plan_linear_logprob(**question, budget_bytes=settings.budget_bytes)
        except ValueError as error:
            raise ValueError(
                "SPOConfig: logprob_budget_mib must hold at least one row of log-probs, got "
                f"{self.args.logprob_budget_mib} MiB ({error})"
            ) from error

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: SPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if args.gamma == 0:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        _refuse_unsupported(None, processing_class, None, None)
        check_tokenizer(processing_class)
        # a list of the user's own, even an empty one, stands for every language
        stop_words = args.key_content_stop_words
        if stop_words is None:
            stop_words = smart_stop_words(args.key_content_language)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(
                f"SPOTrainer: the {dataset_name} dataset must keep at least one row whose prompt "
                f"is shorter than max_length={args.max_length}, got none"
            )
        with global_then_local_main_first():
            return map_key_content(
                dataset,
                dataset_name,
                tokenizer=processing_class,
                num_degrees=args.num_degrees,
                view=args.view,
                stop_words=stop_words,
                num_proc=args.dataset_num_proc,
            )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            if self.args.gamma > 0:
                self._signature_columns += list(key_content_columns(self.args.view))

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
                "SPOTrainer: the DeepSpeed configuration must not define an optimizer, since the "
                "degree head needs a parameter group of its own. Set `optim` in SPOConfig instead."
            )
        grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if id(head[0]) not in grouped:
            rate = self.args.degree_head_learning_rate
            optimizer.add_param_group({"params": head, "lr": rate, "weight_decay": 0.0})
        return optimizer

    # -- loss and metrics

    def compute_ref_log_probs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().compute_ref_log_probs(model, without_added(inputs))

    def _compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        mode = "train" if self.model.training else "eval"
        policy = PolicyCall(model, inputs, with_degree=self._degree_head is not None)
        result = super()._compute_loss(policy, without_added(inputs), return_outputs)
        loss, *rest = result if return_outputs else (result,)
        output = policy.output
        num_pairs = output.log_probs.size(0) // 2
        counts = pair_counts(
            loss,
            num_pairs,
            output.degree_losses,
            output.degree_correct_views,
            output.degree_counted_views,
            output.degree_view_mask,
        )
        # an epoch's last window is fetched whole, and gather_for_metrics would cut every part of it
        # to the size of the last; rows that padded it were trained on, in evaluation they were not
        training = mode == "train"
        gather = self.accelerator.gather if training else self.accelerator.gather_for_metrics
        self._degree_metrics[mode].add(gather(counts))
        if output.degree_losses is not None:
            # the sum over both sides of each side's mean
            loss = loss + self.args.gamma * output.degree_losses.sum() / num_pairs
        return (loss, *rest) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in self._degree_metrics[mode].pop().items():
            self._metrics[mode][name].append(value)
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


def _refuse_settings(
    args: SPOConfig, optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None]
) -> None:
    """Refuse what the degree loss cannot run with."""
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "SPOTrainer: accelerator_config.dispatch_batches must be off, since dispatching cuts "
            "every tensor of a batch to one length, got True"
        )
    if optimizers[0] is not None and optimizers[1] is not None:
        raise ValueError(
            "SPOTrainer: optimizers must leave the scheduler to the trainer, which adds the degree "
            "head's group to the optimizer first, got both. Pass (optimizer, None)."
        )
    if args.kernel_backend == "triton" and args.device.type != "cuda":
        raise ValueError(
            "SPOConfig: kernel_backend='triton' must run on a CUDA device, got "
            f"{args.device.type}. Use 'auto' or 'torch'."
        )


def _refuse_unsupported(
    model: Any, processing_class: Any, train_dataset: Any, peft_config: Any
) -> None:
    """Refuse vision-language models and prompt learning, as soon as an argument shows them."""
    config = getattr(model, "config", None)
    example = {} if train_dataset is None else next(iter(train_dataset), {})
    if (
        isinstance(processing_class, ProcessorMixin)
        or hasattr(config, "vision_config")
        or not {"image", "images"}.isdisjoint(example)
    ):
        raise NotImplementedError(
            "SPOTrainer: vision-language models are not supported: processors expand images into "
            "tokens without character offsets, so key content cannot be placed on the tokens."
        )
    configs = [peft_config] if peft_config is not None else []
    if isinstance(model, nn.Module) and is_peft_model(model):
        configs += model.peft_config.values()
    for one in configs:
        if one.is_prompt_learning:
            raise NotImplementedError(
                f"SPOTrainer: {one.peft_type.value} is not supported: it puts virtual tokens "
                "before the text, so hidden states and removal levels would not line up. Use LoRA."
            )
