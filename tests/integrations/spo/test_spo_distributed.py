"""SPO trainers in two gloo processes: DDP trains like one process, FSDP2 shards the degree head."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from spo_kernels.integrations import SPOTrainer
from spo_kernels.integrations.lm_head.fused_head import FusedHeadSettings, install_fused_head
from spo_kernels.integrations.spo.degree_head import DegreeHead
from spo_kernels.integrations.spo.head_checkpoint import load_head, save_head
from tests.helpers.distributed_cases import in_order, make_spo_trainer
from tests.helpers.spo_cases import build_spo
from tests.helpers.spo_naive import randomize_head
from tests.helpers.trl_tiny import Tiny, history
from tests.helpers.trl_trainers import Data
from tests.helpers.two_processes import assert_equal_across_ranks, rank, run_two_processes, work


def train(tiny: Tiny, folder: Path, *, batch_size: int, wrap=None, **settings) -> SPOTrainer:
    trainer = make_spo_trainer(tiny, folder, batch_size=batch_size, **settings)
    if wrap is not None:
        trainer.data_collator = wrap(trainer.data_collator)
    trainer.train()
    return trainer


def result_of(trainer: SPOTrainer) -> dict:
    names = ("alignment_loss", "degree_loss", "degree_accuracy", "degree_chance", "no_key_content")
    metrics = {name: history(trainer, f"spo/{name}")[-1] for name in names}
    return {"metrics": metrics, "state": dict(trainer.model.state_dict())}


def ddp(folder: Path) -> None:
    tiny = Tiny(folder / f"rank{rank()}")
    for view in ("hidden", "text"):
        result = result_of(train(tiny, folder / "ddp", batch_size=1, view=view))
        assert_equal_across_ranks(result["state"])
        torch.save(result, folder / f"{view}-{rank()}.pt")

    def masked_on_one_rank(collate):
        def masked(examples):
            batch = collate(examples)
            if rank() == 1:
                batch["completion_mask"][:] = 0
                batch["scored_rows"] = 0
                batch["removal_levels"][:] = -1
            return batch

        return masked

    trainer = train(tiny, folder / "ddp", batch_size=1, wrap=masked_on_one_rank)
    assert_equal_across_ranks(dict(trainer.model.state_dict()))
    assert history(trainer, "spo/no_key_content") == [0.5]


def fsdp(folder: Path) -> None:
    # before the group exists, since of a group only the first process would save the model
    tiny = Tiny(folder / f"rank{rank()}")
    dist.init_process_group("gloo")

    def make():
        model = tiny.model()
        model.spo_degree_head = DegreeHead(32, 3)
        generator = torch.Generator().manual_seed(2)
        torch.nn.init.normal_(model.spo_degree_head.weight, generator=generator)
        install_fused_head(model, settings=FusedHeadSettings())
        return model

    def loss_of(model, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 60, (2, 7), generator=generator)
        levels = torch.randint(0, 3, (2, 7), generator=generator).to(torch.int8)
        inputs = {"removal_levels": levels, "segment_offsets": torch.tensor([0, 7, 14])}
        output = model(input_ids=ids, labels=ids, fused_lm_head=True, degree_inputs=inputs)
        return -output.log_probs.sum() + output.degree_losses.sum()

    plain = make()
    ((loss_of(plain, seed=0) + loss_of(plain, seed=1)) / 2).backward()
    for own_group in (False, True):
        sharded = make()
        for layer in sharded.model.layers:
            fully_shard(layer)
        if own_group:
            fully_shard(sharded.get_output_embeddings())
        fully_shard(sharded)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        loss_of(sharded, seed=rank()).backward()
        for (name, expected), found in zip(
            plain.named_parameters(), sharded.parameters(), strict=True
        ):
            torch.testing.assert_close(found.grad.full_tensor(), expected.grad, msg=name)

    # a sharded head is gathered into one file and scattered again
    head = sharded.spo_degree_head
    save_head(head, str(folder), write=rank() == 0)
    dist.barrier()
    with torch.no_grad():
        head.weight.zero_()
    load_head(head, str(folder))
    assert torch.equal(head.weight.full_tensor(), plain.spo_degree_head.weight)


def methods(folder: Path) -> None:
    """One step of SGD on DDP's gradients is one on the mean of those of both processes."""
    # before the group exists, since of a group only the first process would save the model
    data = Data(folder / f"rank{rank()}")
    data.model()
    rate = 0.05
    for name in ("kto", "cpo", "orpo"):
        for view in ("hidden", "text"):
            trainer = build_spo(
                name,
                data,
                folder / f"run{rank()}",
                steps=1,
                gamma=0.7,
                view=view,
                learning_rate=rate,
                degree_head_learning_rate=rate,
                max_grad_norm=0.0,
                ddp_find_unused_parameters=False,
            )
            randomize_head(in_order(trainer))
            start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
            batches, compute = [], trainer.compute_loss

            def noting(model, inputs, *args, batches=batches, compute=compute, **kwargs):
                assert isinstance(model, DistributedDataParallel)
                batches.append(inputs)
                return compute(model, inputs, *args, **kwargs)

            trainer.compute_loss = noting
            trainer.train()
            trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
            assert_equal_across_ranks(trained)

            trainer.model.load_state_dict(start)
            trainer.model.zero_grad()
            compute(trainer.model, *batches).backward()
            moved = []
            for parameter, before in start.items():
                grad = trainer.model.get_parameter(parameter).grad
                dist.all_reduce(grad)
                expected = before - rate * grad / 2
                case = f"{name}, {view}, {parameter}"
                torch.testing.assert_close(
                    trained[parameter], expected, atol=1e-6, rtol=1e-5, msg=case
                )
                moved.append((expected - before).abs().max().item())
            assert sum(value > 1e-5 for value in moved) > len(moved) / 2


@pytest.mark.slow
def test_every_method_under_ddp(tmp_path):
    run_two_processes(__file__, "methods", tmp_path)


@pytest.mark.slow
def test_ddp_equals_one_process(tmp_path):
    """One of the processes never sees key content, and in a third run nothing to score either."""
    run_two_processes(__file__, "ddp", tmp_path)
    tiny = Tiny(tmp_path / "one")
    for view in ("hidden", "text"):
        expected = result_of(train(tiny, tmp_path / "run", batch_size=2, view=view))
        for process in range(2):
            found = torch.load(tmp_path / f"{view}-{process}.pt")
            assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-5)
            assert found["metrics"]["no_key_content"] == 0.5
            for name, value in expected["state"].items():
                torch.testing.assert_close(found["state"][name], value, atol=1e-4, rtol=0, msg=name)


@pytest.mark.slow
def test_fsdp2_gradients(tmp_path):
    """Gradients of the unsharded run, the LM head in the root's group and in its own."""
    run_two_processes(__file__, "fsdp", tmp_path)


if __name__ == "__main__":
    work({"ddp": ddp, "fsdp": fsdp, "methods": methods})
