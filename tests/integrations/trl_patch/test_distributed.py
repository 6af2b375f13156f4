"""Two gloo processes: fused models under DDP, FSDP2 and a split sequence, equal to one process."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface
from trl.trainer import dpo_trainer, sft_trainer

from spo_kernels.integrations import fuse_lm_head, patch_trl
from tests.helpers.distributed_cases import TRL, V, in_order, make_model
from tests.helpers.trl_trainers import Data, build, compare, train
from tests.helpers.two_processes import assert_equal_across_ranks, rank, run_two_processes, work


def batch_of(rank: int, *, labelled: bool) -> dict[str, torch.Tensor]:
    """Return a batch of other shape and other labels on each rank, or of none."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, V, (3, 9) if rank == 0 else (1, 6), generator=generator)
    keep = torch.rand(ids.shape, generator=generator) < (0.6 if labelled else 0.0)
    return {"input_ids": ids, "labels": ids.where(keep, -100)}


def trl_head(model: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """Install the head that a patched trainer installs; return how it calls its model."""
    with patch_trl():
        dpo_trainer.add_fused_lm_head(model)
    return lambda model, **batch: model(**batch, fused_lm_head=True).loss


def transformers_head(model: torch.nn.Module) -> Callable[..., torch.Tensor]:
    fuse_lm_head(model)
    return lambda model, **batch: model(**batch).loss


HEADS = (transformers_head, trl_head)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def assert_gradients(model: torch.nn.Module, expected: dict[str, torch.Tensor], case: str) -> None:
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text: f"{case} {name}: {text}")  # noqa: B023


def stock_gradients(model: torch.nn.Module, batches: list[dict], items: int) -> dict:
    """Return what one process gets of all batches with the model's own loss."""
    for batch in batches:
        model(**batch, num_items_in_batch=items).loss.backward()
    return gradients_of(model)


def cases():
    """Yield ``(name, batches of the ranks, labels in all of them)``."""
    for name, second in (("uneven", True), ("one rank masked", False)):
        batches = [batch_of(0, labelled=True), batch_of(1, labelled=second)]
        yield name, batches, sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)


def ddp() -> None:
    for install in HEADS:
        for name, batches, items in cases():
            model = make_model()
            expected = stock_gradients(copy.deepcopy(model), batches, items)
            call = install(model)
            wrapped = DistributedDataParallel(model)
            # as Trainer does it: the items of all ranks, and a mean over the ranks to make up for
            (call(wrapped, **batches[rank()], num_items_in_batch=items) * 2).backward()
            assert_gradients(model, expected, f"DDP, {install.__name__}, {name}")
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            assert_equal_across_ranks(dict(model.named_parameters()))


def fsdp() -> None:
    for install in HEADS:
        for layout, gathered in LAYOUTS.items():
            for name, batches, items in cases():
                model = make_model(tied="tied" in layout)
                alone = copy.deepcopy(model)
                call = install(model)
                shard(model, layout)
                # a second step finds what the first one has left gathered
                for step in range(2):
                    case = f"FSDP2, {install.__name__}, {layout}, {name}, step {step}"
                    with CommDebugMode() as forward:
                        loss = call(model, **batches[rank()], num_items_in_batch=items) * 2
                    with CommDebugMode() as backward:
                        loss.backward()
                    assert (gathers(forward), gathers(backward)) == gathered, case
                    assert_gradients(model, stock_gradients(alone, batches, items), case)
                    for both in (model, alone):
                        torch.optim.SGD(both.parameters(), lr=0.1).step()
                        both.zero_grad()


# how a model is sharded -> all-gathers in forward and in backward: FSDP2's of a group (two of them
# are the layers'), and those of the head alone. None of the backward's is the head's
LAYOUTS = {
    "head in the root": ((3, 0), (2, 0)),
    "head by itself": ((3, 1), (2, 0)),
    "tied": ((3, 0), (2, 0)),
    "accelerate": ((4, 0), (3, 0)),
    "accelerate, tied": ((3, 0), (2, 0)),
}


def shard(model: torch.nn.Module, layout: str, **settings) -> None:
    if layout.startswith("accelerate"):
        # which on a CPU shards nothing by itself: its state stays at DDP
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
        state = SimpleNamespace(fsdp_plugin=plugin)
        fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="no"), model)
    else:
        for layer in model.model.layers:
            fully_shard(layer, **settings)
        if layout == "head by itself":
            fully_shard(model.get_output_embeddings(), **settings)
        fully_shard(model, **settings)
    assert all(isinstance(p, DTensor) for p in model.parameters())


def gathers(seen: CommDebugMode) -> tuple[int, int]:
    counts = {str(op): count for op, count in seen.get_comm_counts().items()}
    names = ("c10d._allgather_base_", "c10d_functional.all_gather_into_tensor")
    return tuple(counts.pop(name, 0) for name in names)


def mixed_precision() -> None:
    """The head is bf16 inside its group; one that is sharded by itself stays fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for install in HEADS:
        for layout in ("head in the root", "head by itself"):
            batches = [batch_of(r, labelled=True) for r in range(2)]
            shares = []
            for batch in batches:
                half = make_model()
                for name, parameter in half.named_parameters():
                    if (layout, name) != ("head by itself", "lm_head.weight"):
                        parameter.data = parameter.data.bfloat16()
                install(half)(half, **batch).backward()
                shares.append({name: grad.float() for name, grad in gradients_of(half).items()})
            expected = {name: (grad + shares[1][name]) / 2 for name, grad in shares[0].items()}
            model = make_model()
            call = install(model)
            shard(model, layout, mp_policy=policy)
            call(model, **batches[rank()]).backward()
            assert_gradients(model, expected, f"bf16, {install.__name__}, {layout}")


def patched_trainer(data: Data) -> None:
    """DPO and CPO under DDP: the patched run is the stock one, with a masked process too."""

    def nothing_on_one_rank(collate):
        def masked(examples):
            batch = collate(examples)
            if rank() == 1:
                for name, value in batch.items():
                    if name.endswith("labels"):
                        value[:] = -100
                    elif name == "completion_mask":
                        value[:] = 0
            return batch

        return masked

    start = dict(data.model().named_parameters())
    for name, settings in TRL.items():
        for masked in (False, True):

            def run(name=name, settings=settings, masked=masked):
                trainer = build(
                    name, data, data.folder, steps=3, ddp_find_unused_parameters=False, **settings
                )
                in_order(trainer)
                if masked:
                    trainer.data_collator = nothing_on_one_rank(trainer.data_collator)
                record = train(trainer)
                assert isinstance(trainer.model_wrapped, DistributedDataParallel)
                return record

            stock = run()
            with patch_trl():
                found = run()
            compare(found, stock, start, steps=3)
            assert_equal_across_ranks(found.parameters)


def gathered_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attend to the keys of both processes, which hold one half of the positions each."""
    key, value = (torch.cat(all_gather(x.contiguous()), 2) for x in (key, value))
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    rows, columns = query.shape[2], key.shape[2]
    places = torch.arange(columns)
    future = places > places[rank() * rows :][:rows, None]
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(future, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def split_sequence(data: Data) -> None:
    """Labels are shifted before the split; the second half may have none of them."""
    AttentionInterface.register("gathered", gathered_attention)
    for last in (12, 5):
        ids = torch.randint(0, V, (2, 12), generator=torch.Generator().manual_seed(3))
        labels = ids.masked_fill(torch.arange(12) < 2, -100)
        labels[:, last:] = -100
        items = int((labels[:, 1:] != -100).sum())
        half = slice(6 * rank(), 6 * rank() + 6)
        part = {
            "input_ids": ids[:, half],
            "position_ids": torch.arange(12)[None, half].expand(2, -1),
            "shift_labels": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)[:, half],
        }
        alone = make_model()
        loss = alone(input_ids=ids, labels=labels).loss
        loss.backward()
        expected = gradients_of(alone)

        for name in ("fuse_lm_head", "SFT"):
            model = make_model()
            model.set_attn_implementation("gathered")
            if name == "SFT":
                with patch_trl():
                    trainer = build("sft", data, data.folder)
                    # its own model has another vocabulary
                    sft_trainer.add_fused_lm_head(model, outputs=("entropy", "is_top1"))
                    wrapped = DistributedDataParallel(model)
                    share = trainer.compute_loss(wrapped, {**part}, num_items_in_batch=items)
            else:
                fuse_lm_head(model)
                wrapped = DistributedDataParallel(model)
                share = wrapped(**part, num_items_in_batch=items).loss * 2
            share.backward()
            total = share.detach().clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total / 2, loss.detach())
            assert_gradients(model, expected, f"split sequence, {name}, labels up to {last}")


def scenarios(folder: Path) -> None:
    # before the group exists, since of a group only the first process would save the model
    data = Data(folder / f"rank{rank()}")
    data.model()
    dist.init_process_group("gloo")
    ddp()
    fsdp()
    mixed_precision()
    patched_trainer(data)
    split_sequence(data)


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_two_processes(__file__, "all", tmp_path)


if __name__ == "__main__":
    work({"all": scenarios})
