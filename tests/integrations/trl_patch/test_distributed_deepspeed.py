"""DeepSpeed ZeRO-2 and ZeRO-3 in two gloo processes: every trainer ends where a plain run ends."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from spo_kernels.integrations import fuse_lm_head, patch_trl
from tests.helpers.distributed_cases import (
    SPO_STEPS,
    TRL,
    V,
    in_order,
    make_model,
    make_spo_trainer,
)
from tests.helpers.trl_tiny import Tiny
from tests.helpers.trl_trainers import Data, build, lora
from tests.helpers.two_processes import assert_equal_across_ranks, rank, run_two_processes, work

deepspeed = pytest.importorskip("deepspeed")
partition = pytest.importorskip("deepspeed.runtime.zero.partition_parameters")

STEPS = 4
# parameters as few and as small as these would otherwise be gathered once and for all
NOTHING_STAYS_WHOLE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


def engine(stage: int) -> dict:
    """Return the settings of a trainer that DeepSpeed drives, or, for stage 0, of a plain one."""
    common = {"optim": "sgd", "learning_rate": 0.05, "gradient_checkpointing": True}
    if stage == 0:
        return common
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **NOTHING_STAYS_WHOLE},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return {**common, "deepspeed": config}


def state_of(trainer: Trainer, stage: int) -> dict[str, torch.Tensor]:
    model = trainer.model
    # whole outside the model's forward
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def labelled_rows() -> list[dict]:
    """Every second row, one process's, has fewer tokens, and in half of the steps no label."""
    rows = []
    generator = torch.Generator().manual_seed(5)
    for i in range(2 * STEPS):
        ids = torch.randint(0, V, (9 - 3 * (i % 2),), generator=generator)
        kept = 0 if i % 4 == 1 else 4
        rows.append({"input_ids": ids, "labels": ids.where(torch.arange(len(ids)) < kept, -100)})
    return rows


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    def pad(name, value):
        values = [row[name] for row in rows]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)

    ids = pad("input_ids", 0)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "labels": pad("labels", -100), "attention_mask": mask}


def plain_trainer(folder: Path, stage: int, batch_size: int) -> Trainer:
    model = make_model()
    if stage:
        fuse_lm_head(model)
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **engine(stage),
    )
    rows = labelled_rows()
    return in_order(Trainer(model, args, train_dataset=rows, data_collator=padded))


def trl_trainer(name: str, data: Data, stage: int, batch_size: int, adapter=None) -> Trainer:
    trainer = build(
        name,
        data,
        data.folder / "run",
        adapter,
        steps=STEPS,
        per_device_train_batch_size=batch_size,
        **TRL[name],
        **engine(stage),
    )
    collate, calls = trainer.data_collator, []

    def masked_every_other_time(examples):
        """Leave the pairs that fall to the second process without a token to score."""
        batch = collate(examples)
        calls.append(len(examples))
        pairs = slice(1, None, 2) if batch_size == 2 else slice(rank() == 0 and 1, None)
        for key, value in batch.items():
            if len(calls) % 2 and (key.endswith("labels") or key == "completion_mask"):
                fill = -100 if key.endswith("labels") else 0
                for side in value.split(len(examples)):
                    side[pairs] = fill
        return batch

    trainer.data_collator = masked_every_other_time
    return in_order(trainer)


class HeadGathers(TrainerCallback):
    """Notes for each gather of the LM head whether it came in a forward or in a backward.

    DeepSpeed's hooks and GatheredParameters meet in these methods of a parameter.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_begin(self, *_, model, **__) -> None:
        head = model.get_output_embeddings().weight

        def noting(gather):
            def wrapped(params=None, *args, **kwargs):
                asked = [head] if params is None else list(params)
                if any(
                    p is head and p.ds_status == partition.ZeroParamStatus.NOT_AVAILABLE
                    for p in asked
                ):
                    inside = torch._C._current_graph_task_id() != -1
                    self.seen.append("backward" if inside else "forward")
                return gather(params, *args, **kwargs)

            return wrapped

        if hasattr(head, "ds_status"):
            head.all_gather = noting(head.all_gather)
            for parameter in model.parameters():
                parameter.all_gather_coalesced = noting(parameter.all_gather_coalesced)


def train_each(folder: Path, stage: int, batch_size: int) -> dict[str, dict]:
    """Train with each trainer in turn; return where it ended, and what it gathered on the way.

    With stage 0 they are the stock ones, but for SPOTrainer.
    """
    # before the group exists, since of a group only the first process would save the models
    data, tiny = Data(folder), Tiny(folder)
    data.model()
    makers = {
        "fuse_lm_head": lambda: plain_trainer(folder, stage, batch_size),
        "dpo": lambda: trl_trainer("dpo", data, stage, batch_size),
        "dpo, LoRA": lambda: trl_trainer("dpo", data, stage, batch_size, lora("q_proj", "v_proj")),
        "cpo": lambda: trl_trainer("cpo", data, stage, batch_size),
        "spo": lambda: make_spo_trainer(
            tiny, folder / "run", batch_size=batch_size, **engine(stage)
        ),
    }
    results = {}
    for name, make in makers.items():
        with patch_trl() if stage and name.split(",")[0] in TRL else nullcontext():
            trainer = make()
            gathers = HeadGathers()
            trainer.add_callback(gathers)
            trainer.train()
        results[name] = {"state": state_of(trainer, stage), "gathers": gathers.seen}
    return results


def scenario(stage: int) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        # only saves a compiler run: gloo does what that extension would
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        results = train_each(folder / f"rank{rank()}", stage, batch_size=1)
        for result in results.values():
            assert_equal_across_ranks(result["state"])
        if rank() == 0:
            torch.save(results, folder / "results.pt")

    return run


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, dict]:
    return train_each(tmp_path_factory.mktemp("one"), stage=0, batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_equals_one_process(stage, expected, tmp_path):
    """One process has fewer rows to score than the other, or none; a hang ends at the deadline."""
    run_two_processes(__file__, f"zero{stage}", tmp_path)
    results = torch.load(tmp_path / "results.pt")
    for name, alone in expected.items():
        for parameter, value in alone["state"].items():
            found = results[name]["state"][parameter]
            torch.testing.assert_close(found, value, atol=1e-5, rtol=0, msg=f"{name} {parameter}")
        steps = SPO_STEPS if name == "spo" else STEPS
        # the adapter's reference is the model itself, with its adapter off
        once = ["forward"] * (1 + ("LoRA" in name)) + ["backward"]
        assert results[name]["gathers"] == (once * steps if stage == 3 else []), name


if __name__ == "__main__":
    work({f"zero{stage}": scenario(stage) for stage in (2, 3)})
