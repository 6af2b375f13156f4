"""``patch_trl``: every trainer patched against unpatched, and the patch as an object."""

import copy
import importlib
import inspect
import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from trl.trainer import utils as trl_utils

from spo_kernels.integrations import SPOTrainer, patch_trl, trl_version
from spo_kernels.integrations.lm_head import fused_head
from tests.helpers.fused_head_cases import (
    CONFIGS,
    OUTPUTS,
    SETTINGS,
    make_batch,
    make_model,
)
from tests.helpers.processes import run_python
from tests.helpers.trl_tiny import Tiny, arguments
from tests.helpers.trl_trainers import (
    CASES,
    FUSED,
    Data,
    attend_on_cpu,
    build,
    compare,
    eager_fused_head,
    lora,
    train,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    return Data(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def left_as_found(monkeypatch):
    """Every test leaves TRL unpatched; AsyncGRPO runs on a CPU."""
    attend_on_cpu(monkeypatch)
    before = trl_utils._ChunkedLogProbFunction
    yield
    assert trl_utils._ChunkedLogProbFunction is before


def trainer_module(name: str):
    return sys.modules[CASES[name].trainer.__module__]


def parameters_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def build_unpatched(name, data, folder, adapter, monkeypatch=None, **settings):
    """Build what a patched trainer is compared with: TRL's own trainer.

    With a monkeypatch it is one that TRL refuses, an adapter on lm_head beside its fused head: the
    model's own forward with all its logits takes the place of that head.
    """
    if monkeypatch is None:
        return build(name, data, folder, adapter, **settings)
    with patch_trl(), monkeypatch.context() as oracle:
        oracle.setattr(trainer_module(name), "add_fused_lm_head", eager_fused_head)
        return build(name, data, folder, adapter, **settings)


ADAPTERS = {"full": None, "lora": lora("q_proj"), "lora_head": lora("q_proj", "lm_head")}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", CASES)
def test_patched_trains_like_unpatched(name, kind, data, tmp_path, monkeypatch):
    """Losses and metrics of each of ten steps, the parameters after them."""
    adapter = ADAPTERS[kind]
    oracle = monkeypatch if kind == "lora_head" and name in FUSED else None

    def stock():
        return build_unpatched(name, data, tmp_path / "stock", adapter, oracle)

    expected = stock()
    start = parameters_of(expected)
    trained = train(expected)
    with patch_trl():
        found = train(build(name, data, tmp_path / "ours", adapter))
    compare(found, trained, start, stock=stock)


@pytest.mark.parametrize("name", ["cpo", "orpo", "tpo", "online_dpo", "dpo"])
def test_dropout_of_the_heads_adapter(name, data, tmp_path, monkeypatch):
    """The same seed drops the same values as PEFT's own forward does."""
    adapter = lora("lm_head", dropout=0.3)
    settings = {"disable_dropout": False}
    oracle = monkeypatch if name in FUSED else None
    expected = build_unpatched(name, data, tmp_path / "stock", adapter, oracle, **settings)
    start = parameters_of(expected)
    trained = train(expected)
    with patch_trl():
        found = train(build(name, data, tmp_path / "ours", adapter, **settings))
    compare(found, trained, start)


@pytest.mark.parametrize("name", ["dpo", "cpo", "online_dpo"])
def test_a_head_that_is_trained_whole_beside_an_adapter(name, data, tmp_path):
    """``modules_to_save`` keeps two heads: the reference pass reads the other one."""
    adapter = lora("q_proj")
    adapter.modules_to_save = ["lm_head"]
    expected = build(name, data, tmp_path / "stock", adapter)
    start = parameters_of(expected)
    trained = train(expected)
    with patch_trl():
        found = train(build(name, data, tmp_path / "ours", adapter))
    compare(found, trained, start)


@pytest.mark.parametrize("architecture", ["experts", "softcap"])
@pytest.mark.parametrize("name", ["cpo", "orpo", "tpo", "dpo"])
def test_other_architectures(name, architecture, data, tmp_path, monkeypatch):
    """The router's loss is in the loss; a softcap is in the mean logits of every position."""
    config = copy.deepcopy(CONFIGS[architecture])
    config.vocab_size = len(data.tokenizer)
    config.pad_token_id = data.tokenizer.pad_token_id
    config.eos_token_id = data.tokenizer.eos_token_id
    config.bos_token_id = None

    def model(*_):
        torch.manual_seed(4)
        made = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        made.save_pretrained(tmp_path / "model")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    monkeypatch.setattr(data, "model", model)
    expected = build(name, data, tmp_path / "stock")
    start = parameters_of(expected)
    trained = train(expected)
    with patch_trl():
        found = train(build(name, data, tmp_path / "ours"))
    compare(found, trained, start)


@pytest.mark.parametrize("kind", ["full", "lora_head"])
@pytest.mark.parametrize("name", ["cpo", "dpo", "tpo"])
def test_evaluation_and_checkpoints(name, kind, data, tmp_path, monkeypatch):
    """Both evaluate and save alike, and either goes on from the other's checkpoint."""
    adapter = ADAPTERS[kind]
    settings = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps"}
    settings |= {"eval_steps": 5, "eval_dataset": True}
    oracle = monkeypatch if name in FUSED else None
    folders = [tmp_path / side for side in ("ours", "stock")]
    for resumed in (None, folders[0] / "checkpoint-5", folders[1] / "checkpoint-5"):
        with patch_trl():
            ours = build(name, data, folders[0], adapter, **settings)
            found = train(ours, resumed)
        stock = build_unpatched(name, data, folders[1], adapter, oracle, **settings)
        start = parameters_of(stock)
        compare(found, train(stock, resumed), start, steps=5 if resumed else 10)
        if resumed is None:
            assert any("eval_loss" in entry for entry in found.logs)
        file = "model.safetensors" if adapter is None else "adapter_model.safetensors"
        saved, expected = (load_file(folder / "checkpoint-10" / file) for folder in folders)
        assert saved.keys() == expected.keys()
        for tensor, value in saved.items():
            torch.testing.assert_close(value, expected[tensor], atol=1e-5, rtol=1e-4, msg=tensor)


class Allocations(TorchDispatchMode):
    """Counts every tensor that an operation returns by its number of elements."""

    def __init__(self):
        super().__init__()
        self.sizes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.sizes[value.numel()] += 1
        return out


VOCAB = 20_000


def measure_step(name, adapter, data, folder) -> tuple[int, int]:
    """Return the most elements that one tensor of a step has, and the fewest rows scored by it."""
    longer = {
        key: 32
        for key in ("max_completion_length", "max_new_tokens")
        if key in CASES[name].settings
    }
    if name == "online_dpo":
        longer["max_length"] = 64
    trainer = build(name, data, folder, adapter, vocab_size=VOCAB, steps=2, **longer)
    base = trainer.model if adapter is None else trainer.model.get_base_model()
    plain, step = base.forward, trainer.training_step
    rows, largest = [], []

    def counting(self, *args, **inputs):
        output = plain(*args, **inputs)
        if inputs.get("fused_lm_head"):
            rows.append(int(output.label_mask.sum()))
        return output

    def measured(*args, **kwargs):
        with Allocations() as seen:
            result = step(*args, **kwargs)
        largest.append(max(seen.sizes))
        return result

    counting.__signature__ = inspect.signature(plain)
    base.forward = counting.__get__(base)
    trainer.training_step = measured
    trainer.train()
    return max(largest), min(rows, default=0)


@pytest.mark.parametrize("kind", ["full", "lora_head"])
@pytest.mark.parametrize("name", CASES)
def test_no_logits(name, kind, data, tmp_path):
    """No tensor of a patched step has a row of V for every scored token; TRL's own step has one."""
    with patch_trl(budget_bytes=1_500_000):
        largest, rows = measure_step(name, ADAPTERS[kind], data, tmp_path / "ours")
    # generation makes a row of logits per sequence, or per token of a prompt under PEFT
    assert VOCAB * 4 <= largest < rows * VOCAB
    if name not in FUSED:
        largest, _ = measure_step(name, ADAPTERS[kind], data, tmp_path / "stock")
        assert largest >= rows * VOCAB


def snapshot() -> dict[str, object]:
    with patch_trl() as patch:
        owners = [(replaced.owner, replaced.name) for replaced in patch._replaced]
    return {(owner, name): vars(owner)[name] for owner, name in owners}


def test_undo_restores_the_very_objects():
    before = snapshot()
    patch = patch_trl()
    assert patch.active
    for (owner, name), original in before.items():
        assert vars(owner)[name] is not original, name
    patch.undo()
    patch.undo()
    assert not patch.active and patch.report() == {}
    for (owner, name), original in before.items():
        assert vars(owner)[name] is original, name


def test_twice_is_once():
    before = snapshot()
    first = patch_trl()
    assert patch_trl() is first
    with patch_trl() as second:
        assert second is first
    # the with block ends what it began, not what was there before it
    assert first.active
    first.undo()
    assert all(vars(owner)[name] is original for (owner, name), original in before.items())
    with patch_trl() as outer:
        with patch_trl() as inner:
            assert inner is outer
        assert outer.active
    assert not outer.active
    with pytest.raises(KeyError), patch_trl() as raised:
        raise KeyError
    assert not raised.active
    again = patch_trl()
    with again:
        with again:
            pass
        assert again.active
    assert not again.active
    with pytest.raises(RuntimeError, match="patch_trl: the patch must be on, got an undone one"):
        again.__enter__()


def test_report_names_what_is_patched():
    with patch_trl() as patch:
        report = patch.report()
        assert patch.skipped == {}
        assert len(report) == len(patch._replaced)
        for dotted, effect in report.items():
            parts = dotted.split(".")
            owner = trl_of(parts[:-1])
            assert vars(owner)[parts[-1]] in [replaced.replacement for replaced in patch._replaced]
            assert effect
        assert "trl.trainer.utils._ChunkedLogProbFunction" in report
        assert "trl.experimental.tpo.tpo_trainer.TPOTrainer._compute_loss" in report
        assert "TPOTrainer._compute_loss" in repr(patch)
    # nothing of TRL is changed beyond the report
    with patch_trl():
        modules = {case.trainer.__module__ for case in CASES.values()} | {"trl.trainer.utils"}
        patched = {name: dict(vars(sys.modules[name])) for name in modules}
        classes = {case.trainer: dict(vars(case.trainer)) for case in CASES.values()}
    changed = set()
    for name, names in patched.items():
        now = vars(sys.modules[name])
        changed |= {f"{name}.{key}" for key in names if names[key] is not now[key]}
    for kind, names in classes.items():
        now = vars(kind)
        changed |= {
            f"{kind.__module__}.{kind.__qualname__}.{key}"
            for key in names
            if names[key] is not now.get(key)
        }
    assert changed == set(report)


def trl_of(parts: list[str]):
    if parts[-1][0].isupper():
        return getattr(importlib.import_module(".".join(parts[:-1])), parts[-1])
    return importlib.import_module(".".join(parts))


def test_errors_half_way_roll_back(monkeypatch):
    before = snapshot()
    module = trainer_module("a2po")
    monkeypatch.delattr(module.A2POTrainer, "_get_sequence_logps")
    with pytest.raises(KeyError, match="_get_sequence_logps"):
        patch_trl()
    monkeypatch.undo()
    attend_on_cpu(monkeypatch)
    for (owner, name), original in before.items():
        assert vars(owner)[name] is original, name


def test_a_module_that_cannot_be_imported_is_skipped(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental.async_grpo.async_grpo_trainer", None)
    with patch_trl() as patch:
        assert list(patch.skipped) == ["trl.experimental.async_grpo.async_grpo_trainer"]
        assert not any("async_grpo" in name for name in patch.report())
        assert "trl.trainer.grpo_trainer.add_fused_lm_head" in patch.report()


def test_untested_versions(monkeypatch):
    monkeypatch.setattr(trl_version, "version", lambda name: "1.17.0")
    with pytest.raises(
        RuntimeError,
        match=r"patch_trl: trl must be >= 1.16 and < 1.17, got 1.17.0.*allow_untested=True",
    ):
        patch_trl()
    with patch_trl(allow_untested=True) as patch:
        assert patch.active


def test_settings():
    with pytest.raises(ValueError, match="patch_trl: backend must be one of 'auto', .* got 'cuda'"):
        patch_trl(backend="cuda")
    with pytest.raises(ValueError, match="patch_trl: budget_bytes must be > 0, got 0"):
        patch_trl(budget_bytes=0)
    with pytest.raises(TypeError, match="patch_trl: budget_bytes must be an int or None, got str"):
        patch_trl(budget_bytes="1GB")
    with patch_trl(budget_bytes=2**26):
        with pytest.raises(
            ValueError, match="patch_trl: budget_bytes must be 67108864 while that patch is on"
        ):
            patch_trl()


def test_import_patches_nothing():
    run_python(
        """
from trl.trainer import dpo_trainer, utils
before = {module: dict(vars(module)) for module in (dpo_trainer, utils)}
import spo_kernels.integrations as integrations
from spo_kernels.integrations import TRLPatch, patch_trl
from spo_kernels.integrations.trl_patch import heads, online, pairs
assert {module: dict(vars(module)) for module in before} == before
"""
    )


def test_a_trainer_from_before_the_patch(data, tmp_path, monkeypatch):
    """TRL's own fused head looks its function up when it runs; the others keep their methods."""
    for name in ("dpo", "cpo"):
        expected = build(name, data, tmp_path / "stock")
        start = parameters_of(expected)
        early = build(name, data, tmp_path / "early")
        trained = train(expected)
        calls = Counter()
        with patch_trl() as patch:
            function = trl_utils._ChunkedLogProbFunction
            original = type(function).apply

            def counted(self, *args, calls=calls, original=original):
                calls["apply"] += 1
                return original(self, *args)

            monkeypatch.setattr(type(function), "apply", counted)
            found = train(early)
            monkeypatch.undo()
            attend_on_cpu(monkeypatch)
            assert patch.active
        assert bool(calls) == (name == "dpo")
        compare(found, trained, start)


@pytest.mark.parametrize("name", ["dpo", "cpo", "tpo", "online_dpo"])
def test_a_trainer_from_under_the_patch_outlives_it(name, data, tmp_path):
    adapter = ADAPTERS["full" if name == "tpo" else "lora_head"]
    with patch_trl():
        early = build(name, data, tmp_path / "early", adapter)
        expected = build(name, data, tmp_path / "ours", adapter)
        start = parameters_of(expected)
        trained = train(expected)
    compare(train(early), trained, start)


def test_a_reference_model_that_is_given(data, tmp_path):
    """Online DPO prepares it before its constructor returns; a copy keeps a head of its own."""
    records = []
    for patched in (False, True):
        reference = data.model()
        torch.manual_seed(5)
        torch.nn.init.normal_(reference.lm_head.weight, std=0.3)
        if patched:
            with patch_trl():
                trainer = build("online_dpo", data, tmp_path / "ours", ref_model=reference)
                found = train(trainer)
            assert trainer.ref_model.forward.__self__ is trainer.ref_model
        else:
            trainer = build("online_dpo", data, tmp_path / "stock", ref_model=reference)
            start = parameters_of(trainer)
            records.append(train(trainer))
    compare(found, records[0], start)


def test_two_trainers_of_one_model(data, tmp_path, monkeypatch):
    """Each head keeps its own temperature and outputs, whichever was installed last."""
    records = []
    for patched in (False, True):
        shared = data.model()
        with monkeypatch.context() as one_model, patch_trl() if patched else nullcontext():
            one_model.setattr(data, "model", lambda *_, shared=shared: shared)
            trainers = [build(name, data, tmp_path / name) for name in ("grpo", "cpo", "tpo")]
        start = parameters_of(trainers[0])
        records.append([train(trainer) for trainer in trainers])
    for found, expected in zip(records[1], records[0], strict=True):
        compare(found, expected, start)


@pytest.mark.parametrize("name", CONFIGS)
def test_late_bound_function(name):
    """All outputs and gradients of TRL's function, through TRL's own fused head."""
    asked = {"output_router_logits": True} if name == "experts" else {}
    results = []
    for patched in (False, True):
        model = make_model(name)
        trl_utils.add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)
        if patched:
            with patch_trl():
                output = model(**make_batch(), **asked, fused_lm_head=True)
        else:
            output = model(**make_batch(), **asked, fused_lm_head=True)
        (output.loss + output.entropy.sum()).backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters()}))
    (expected, expected_grads), (found, grads) = results
    for field in ("loss", *OUTPUTS):
        torch.testing.assert_close(found[field], expected[field], atol=2e-5, rtol=1e-5, msg=field)
    assert not found.mean_logits.requires_grad and not found.log_sum_sq_probs.requires_grad
    for parameter, grad in grads.items():
        torch.testing.assert_close(
            grad, expected_grads[parameter], atol=2e-5, rtol=1e-3, msg=parameter
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_mean_logits_of_every_position(name):
    """A prompt's and a padding's too, with a softcap or an adapter or neither."""
    for adapted in (False, True):
        model = make_model(name)
        base = model
        if adapted:
            model = get_peft_model(model, lora("lm_head"))
        fused_head.install_fused_head(base, ("position_mean_logits",), settings=SETTINGS)
        output = model(**make_batch(), fused_lm_head=True)
        batch = {k: v for k, v in make_batch().items() if k != "labels"}
        expected = model(**batch).logits.mean(-1)
        torch.testing.assert_close(output.position_mean_logits, expected, atol=1e-5, rtol=1e-4)
        if adapted:
            with model.disable_adapter():
                without = model(**make_batch(), fused_lm_head=True).position_mean_logits
                torch.testing.assert_close(
                    without, model(**batch).logits.mean(-1), atol=1e-5, rtol=1e-4
                )
            assert not torch.allclose(without, output.position_mean_logits)


def test_several_adapters_and_their_dtype():
    """Two active adapters add up; merged and disabled ones add nothing; bf16 with fp32 adapters."""
    model = get_peft_model(make_model("llama"), lora("lm_head"))
    model.add_adapter("second", lora("lm_head"))
    model.base_model.set_adapter(["default", "second"])
    fused_head.install_fused_head(model.get_base_model(), OUTPUTS, settings=SETTINGS)
    batch = {k: v for k, v in make_batch().items() if k != "labels"}
    labels = make_batch()["labels"][:, 1:]
    mask = labels != -100

    def check(tolerance: float) -> torch.Tensor:
        found = model(**make_batch(), fused_lm_head=True).log_probs
        logp = model(**batch).logits[:, :-1].float().log_softmax(-1)
        expected = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * mask
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        return found

    both = check(2e-5)
    with model.disable_adapter():
        assert not torch.allclose(check(2e-5), both)
    model.merge_adapter()
    torch.testing.assert_close(check(2e-5), both, atol=1e-4, rtol=0)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    # the model's own logits, up to 31, are rounded to multiples of 1 / 8
    check(1 / 8)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LoraConfig(target_modules=["lm_head"], use_dora=True), "DoraLinearVariant"),
        (LoraConfig(target_modules=["lm_head"], lora_bias=True), "LoRA with lora_bias"),
    ],
)
def test_adapters_that_cannot_be(config, found):
    model = make_model("llama")
    if config.lora_bias:
        model.lm_head = torch.nn.Linear(32, 61)
    fused_head.install_fused_head(model, settings=SETTINGS)
    model = get_peft_model(model, config)
    with pytest.raises(
        NotImplementedError,
        match=f"fused_lm_head: the LM head's adapter must be plain LoRA, got {found}",
    ):
        model(**make_batch(), fused_lm_head=True)


def test_fp32_head_refuses_an_adapter(data, tmp_path):
    with patch_trl(), pytest.raises(ValueError, match="cast_lm_head_to_fp32 must be False"):
        build("grpo", data, tmp_path, ADAPTERS["lora_head"], cast_lm_head_to_fp32=True)


def test_fp32_head(data, tmp_path):
    """GRPO may run its head in fp32 under a bf16 body."""
    settings = {"cast_lm_head_to_fp32": True, "bf16": True}
    expected = build("grpo", data, tmp_path / "stock", **settings)
    start = parameters_of(expected)
    trained = train(expected)
    with patch_trl():
        found = train(build("grpo", data, tmp_path / "ours", **settings))
    compare(found, trained, start)


def test_spo_trainer_takes_an_adapter_on_the_head_too(tmp_path):
    tiny = Tiny(tmp_path)
    with patch_trl():
        trainer = SPOTrainer(
            model=tiny.model(),
            args=arguments(tmp_path / "run"),
            train_dataset=tiny.dataset,
            processing_class=tiny.tokenizer,
            peft_config=lora("lm_head"),
        )
    before = parameters_of(trainer)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_public_signature():
    parameters = inspect.signature(patch_trl).parameters.values()
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters)
