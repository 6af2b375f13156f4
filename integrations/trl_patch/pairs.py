"""CPO (SimPO, AlphaPO), ORPO and TPO on the fused head: their methods without logits."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from spo_kernels.integrations.lm_head.fused_head import FusedHeadSettings, SPOCausalLMOutput
from spo_kernels.integrations.trl_patch.change import Change
from spo_kernels.integrations.trl_patch.init import fused_head_after_init, fused_head_of

_CPO = "trl.experimental.cpo.cpo_trainer"
_ORPO = "trl.experimental.orpo.orpo_trainer"
_TPO = "trl.experimental.tpo.tpo_trainer"
# outputs that the methods of CPO and ORPO below read, besides log-probs
PAIR_OUTPUTS = ("position_mean_logits",)
_NO_LOGITS = "scores chosen and rejected labels on the fused head, without logits"


def changes(settings: FusedHeadSettings) -> list[Change]:
    """Return the changes that serve CPO, ORPO and TPO."""
    per_position = fused_head_after_init(PAIR_OUTPUTS, settings)
    per_token = fused_head_after_init(("entropy", "mean_logits", "is_top1"), settings)
    install = "installs the fused head on the policy"
    return [
        Change(f"{_CPO}:CPOTrainer", "__init__", install, per_position),
        Change(f"{_CPO}:CPOTrainer", "concatenated_forward", _NO_LOGITS, cpo_forward),
        Change(f"{_ORPO}:ORPOTrainer", "__init__", install, per_position),
        Change(f"{_ORPO}:ORPOTrainer", "concatenated_forward", _NO_LOGITS, orpo_forward),
        Change(f"{_TPO}:TPOTrainer", "__init__", install, per_token),
        Change(f"{_TPO}:TPOTrainer", "_compute_loss", _NO_LOGITS, _tpo_loss),
        Change(
            _TPO,
            "selective_log_softmax_and_entropy",
            "reads what the fused head has scored",
            _selected_or_scored,
        ),
    ]


def _score_pairs(
    trainer: Any, model: nn.Module, joined: dict[str, torch.Tensor], labels: torch.Tensor
) -> SPOCausalLMOutput:
    """Run chosen and rejected sequences through the fused head, in the model's own forward."""
    router = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
    return model(
        input_ids=joined["concatenated_input_ids"],
        attention_mask=joined["concatenated_attention_mask"],
        labels=labels,
        fused_lm_head=fused_head_of(trainer),
        **router,
    )


def _halves(values: torch.Tensor, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    return values[:chosen], values[chosen:]


def cpo_forward(original: Callable[..., tuple]) -> Callable[..., tuple]:
    """Return CPO's ``concatenated_forward`` for the fused head; without one, ``original``."""

    @functools.wraps(original)
    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple:
        if fused_head_of(self) is None:
            return original(self, model, batch)
        joined = self.concatenated_inputs(
            batch, padding_value=self.pad_token_id, device=self.accelerator.device
        )
        chosen = len(batch["chosen_labels"])
        scored = _score_pairs(self, model, joined, joined["concatenated_labels"])
        counts = scored.label_mask.sum(-1)
        sums = scored.log_probs.sum(-1)
        if self.cpo_alpha == 0:
            nll = sums.new_zeros(())
        else:
            nll = -sums[:chosen].sum() / counts[:chosen].sum()
        logps = sums / counts if self.loss_type in ("ipo", "simpo") else sums
        # the caller takes nothing but their mean, which is that of the logits
        mean_logits = _halves(scored.position_mean_logits, chosen)
        router = (scored.aux_loss,) if self.aux_loss_enabled else ()
        return (*_halves(logps, chosen), *mean_logits, nll, *router)

    return concatenated_forward


def orpo_forward(original: Callable[..., tuple]) -> Callable[..., tuple]:
    """Return ORPO's ``concatenated_forward`` for the fused head; without one, ``original``."""

    @functools.wraps(original)
    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple:
        if fused_head_of(self) is None:
            return original(self, model, batch)
        joined = self.concatenated_inputs(
            batch, padding_value=self.padding_value, device=self.accelerator.device
        )
        chosen = len(batch["chosen_labels"])
        # the NLL of a chosen sequence counts its prompt, the log-probs do not
        labels = joined["concatenated_labels"].clone()
        attended = joined["concatenated_attention_mask"][:chosen] == 1
        labels[:chosen] = joined["concatenated_input_ids"][:chosen].where(attended, -100)
        scored = _score_pairs(self, model, joined, labels)
        nll = -scored.log_probs[:chosen].sum() / scored.label_mask[:chosen].sum()
        completion = (joined["concatenated_labels"][:, 1:] != -100).to(scored.log_probs.device)
        logps = (scored.log_probs * completion).sum(-1) / completion.sum(-1)
        # the caller takes nothing but their mean, which is that of the logits
        mean_logits = _halves(scored.position_mean_logits[:, :-1], chosen)
        router = (scored.aux_loss,) if self.aux_loss_enabled else ()
        return (*_halves(logps, chosen), *mean_logits, nll, *router)

    return concatenated_forward


def _tpo_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool):
        # who asks for the outputs gets logits
        if return_outputs or fused_head_of(self) is None:
            return original(self, model, inputs, return_outputs)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)

        def scoring_model(**model_inputs: Any) -> SimpleNamespace:
            scored = model(**model_inputs, labels=labels, fused_lm_head=fused_head_of(self))
            rows = ScoredTokens(
                inputs["input_ids"][:, 1:],
                scored.log_probs,
                scored.entropy,
                scored.mean_logits,
                scored.is_top1,
            )
            return SimpleNamespace(logits=_BeforeShift(rows))

        return original(self, scoring_model, inputs, return_outputs)

    return _compute_loss


class _BeforeShift:
    """Stands for logits of which the last position has not been cut off yet."""

    def __init__(self, rows: "ScoredTokens") -> None:
        self.rows = rows

    def __getitem__(self, index: tuple) -> "ScoredTokens":
        if index != (..., slice(None, -1, None), slice(None)):
            raise NotImplementedError(f"patch_trl: TPO must cut off the last logits, got {index}")
        return self.rows


class ScoredTokens:
    """Stands for TPO's logits: answers what its loss and metrics ask of them, and nothing else."""

    def __init__(
        self,
        labels: torch.Tensor,
        log_probs: torch.Tensor,
        entropy: torch.Tensor,
        mean_logits: torch.Tensor,
        is_top1: torch.Tensor,
    ) -> None:
        self.labels = labels
        self.log_probs = log_probs
        self.entropy = entropy
        self.mean_logits = mean_logits
        self.is_top1 = is_top1

    def _each(self, take: Callable[[torch.Tensor], torch.Tensor]) -> "ScoredTokens":
        return ScoredTokens(**{name: take(value) for name, value in vars(self).items()})

    def detach(self) -> "ScoredTokens":
        return self._each(torch.Tensor.detach)

    def __getitem__(self, rows: torch.Tensor) -> "ScoredTokens":
        return self._each(lambda value: value[rows])

    def chunk(self, chunks: int, dim: int) -> list["ScoredTokens"]:
        parts = {name: value.chunk(chunks, dim) for name, value in vars(self).items()}
        return [
            ScoredTokens(**dict(zip(parts, values, strict=True)))
            for values in zip(*parts.values(), strict=True)
        ]

    def mean(self, dim: int) -> torch.Tensor:
        assert dim == -1, "only the mean over the vocabulary is known"
        return self.mean_logits

    def argmax(self, dim: int) -> torch.Tensor:
        """Return the label where it is the most likely token, an impossible token elsewhere."""
        assert dim == -1, "only the most likely token is known"
        return self.labels.where(self.is_top1, -1)

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        options = dict(kwargs or {})
        plain = options.pop("reduction", "mean") == "mean" and options.pop("ignore_index", -100) < 0
        if function is not cross_entropy or not plain or any(options.values()):
            return NotImplemented
        return -args[0].log_probs.mean()


def _selected_or_scored(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def selective_log_softmax_and_entropy(logits: Any, *args: Any, **kwargs: Any):
        if isinstance(logits, ScoredTokens):
            return logits.log_probs, logits.entropy.detach()
        return original(logits, *args, **kwargs)

    return selective_log_softmax_and_entropy
