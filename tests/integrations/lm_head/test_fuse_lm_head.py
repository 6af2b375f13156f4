"""``fuse_lm_head`` against the model's own loss: architectures, Trainer, LoRA, undo, memory."""

import copy
import inspect
import math
import re
import subprocess
import sys
import types

import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spo_kernels.integrations import fuse_lm_head
from spo_kernels.integrations.lm_head.lm_head import LOGIT_SCALES, SOFTCAPS

V, B, T = 97, 3, 9
SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.3,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 24}
LATENT = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_chunk_size": 4,
    "mamba_n_groups": 1,
}
DELTA = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
MAMBA = {"state_size": 4, "time_step_rank": 2}
CHANGES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {},
    "ministral": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "vaultgemma": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "nanochat": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "recurrent_gemma": {"lru_width": 16, "logits_soft_cap": 1.5, "num_hidden_layers": 3},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "head_dim": 8},
    "granite": {"logits_scaling": 3.0},
    "minicpm3": {**LATENT, "dim_model_base": 4},
    "falcon_h1": {
        "lm_head_multiplier": 0.4,
        "head_dim": 8,
        "mamba_d_ssm": 16,
        "mamba_n_heads": 2,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "mamba_chunk_size": 4,
    },
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon": {},
    "phi": {"num_key_value_heads": 2},
    "phi3": {},
    "gpt2": GPT2,
    "gptj": {**GPT2, "rotary_dim": 4},
    "gpt_bigcode": GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0.0},
    "bloom": {"n_layer": 2, "n_head": 2, "hidden_dropout": 0.0},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32, "logit_scale": 0.3},
    "stablelm": {},
    "starcoder2": {"embedding_dropout": 0.0},
    "olmo": {},
    "olmo2": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "nemotron": {},
    "smollm3": {},
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 24,
        "pad_token_id": 0,
    },
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2},
    "gemma3n_text": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": V,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": None,
        "final_logit_softcapping": 1.5,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": V,
        "final_logit_softcapping": 1.5,
    },
    "qwen3_5_text": DELTA,
    "qwen3_next": {**DELTA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "jamba": {
        **EXPERTS,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
    },
    "bamba": {**MAMBA2, "attn_layer_indices": [1], "z_loss_coefficient": 0.0},
    "granitemoehybrid": {
        **MAMBA2,
        **EXPERTS,
        "num_local_experts": 4,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 16,
        "logits_scaling": 3.0,
    },
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 8},
    "olmoe": {**EXPERTS, "num_experts": 4},
    "granitemoe": {**EXPERTS, "num_local_experts": 4, "logits_scaling": 3.0},
    "jetmoe": {**EXPERTS, "num_local_experts": 4, "kv_channels": 8, "aux_loss_coef": 0.3},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "head_dim": 8},
    "phimoe": {**EXPERTS, "num_local_experts": 4},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "head_dim": 8},
}


def make_model(name: str = "llama", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SHAPE, **CHANGES[name], **changes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # peaked enough for softcaps and scales to matter
            parameter.data.mul_(3.0)
    return model


def make_batch(*, seed: int = 1, padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (B, T), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    labels = ids.masked_fill(torch.arange(T) < 3, -100).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(ours, theirs, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare two losses and all gradients of two models."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found, expected = gradients(ours, found), gradients(theirs, expected)
    largest = max(grad.abs().max().item() for grad in expected.values() if grad is not None)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
        else:
            # some gradients, such as a key bias's, are zero but for rounding
            torch.testing.assert_close(
                found[name], grad, atol=1e-5 * largest, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


def has_router_logits(model) -> bool:
    return "router_logits" in model.model(torch.ones(1, 2, dtype=int), output_router_logits=True)


@pytest.mark.parametrize("name", CHANGES)
def test_architectures(name):
    theirs = make_model(name)
    ours = copy.deepcopy(theirs)
    fuse_lm_head(ours)
    batch = make_batch()
    if name in ("granitemoe", "granitemoehybrid") and not has_router_logits(theirs):
        pytest.skip(f"{name} of transformers {transformers.__version__} loses its router logits")
    for extra in ({}, {"num_items_in_batch": torch.tensor(40)}):
        found, expected = ours(**batch, **extra), theirs(**batch, **extra)
        assert found.logits is None and expected.logits is not None
        assert_same(ours, theirs, found.loss, expected.loss)
    if "output_router_logits" in CHANGES[name]:
        found, expected = (m(**batch, output_router_logits=True) for m in (ours, theirs))
        assert_same(ours, theirs, found.loss, expected.loss)
        torch.testing.assert_close(found.aux_loss, expected.aux_loss)
        assert found.aux_loss > 0
        found, expected = (m(**batch, output_router_logits=False) for m in (ours, theirs))
        assert "aux_loss" not in found
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_transforms_are_known():
    """A family of the installed transformers that treats its logits in a new way shows here."""
    known = {*LOGIT_SCALES, *SOFTCAPS, "z_loss_coefficient", "unpadded_vocab_size"}
    known |= {"slice_logits_to_keep", "vocab_size", "router_logits", "output_router_logits"}
    known |= {"router_aux_loss_coef", "aux_loss_coef", "tanh", "soft_cap"}
    # Inkling 2's module of that name is refused as a third part of the model
    known |= {"logit_softcap"}
    telling = re.compile("logit|cap|scal|multipl|mup|z_loss|vocab|coef|tanh|temperature")
    seen = 0
    for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        names = inspect.unwrap(getattr(transformers, name).forward).__code__.co_names
        if "loss_function" in names:
            new = {used for used in names if telling.search(used)} - known
            assert not new, f"{name} uses {new}: see integrations/lm_head.py"
            seen += 1
    assert seen > 100


def test_arguments():
    """What the loss of transformers accepts beside labels, by keyword and by position."""
    theirs = make_model("qwen3_moe")
    ours = copy.deepcopy(theirs)
    fuse_lm_head(ours)
    batch = make_batch()
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    packed = make_batch(padded=False)
    packed["attention_mask"] = None
    # with a cache transformers would not see the packing
    packed["use_cache"] = False
    packed["position_ids"] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(B, T)
    embedded = {**batch, "inputs_embeds": ours.get_input_embeddings()(batch["input_ids"]).detach()}
    del embedded["input_ids"]
    calls = [
        {**batch, "num_items_in_batch": 7},
        {**batch, "shift_labels": shifted.roll(1, 1)},
        {**batch, "labels": batch["labels"].masked_fill(batch["labels"] < 0, 5), "ignore_index": 5},
        {**batch, "logits_to_keep": 0, "use_cache": True, "return_dict": True},
        packed,
        embedded,
    ]
    for call in calls:
        assert_same(ours, theirs, ours(**call).loss, theirs(**call).loss)
    positional = ours(
        batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"]
    )
    assert torch.equal(positional.loss, ours(**batch).loss)
    # transformers itself needs labels for a loss
    found = ours(**{**batch, "labels": None}, shift_labels=shifted, output_router_logits=False)
    expected = theirs(**batch, output_router_logits=False)
    torch.testing.assert_close(found.loss, expected.loss)
    as_tuple = ours(**batch, return_dict=False, output_router_logits=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], found.loss)
    assert len(ours(**batch, output_hidden_states=True).hidden_states) == 3
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    with pytest.raises(
        ValueError, match="^fuse_lm_head: logits_to_keep must be 0 in a call with labels, got 2. "
    ):
        ours(**batch, logits_to_keep=2)


def test_nothing_to_score():
    """Differs from transformers by intent: its mean over no label is NaN."""
    model = make_model()
    fuse_lm_head(model, label_smoothing=0.1, z_loss=0.1)
    batch = make_batch()
    batch["labels"][:] = -100
    for extra in ({}, {"num_items_in_batch": torch.tensor(0)}):
        loss = model(**batch, **extra).loss
        assert loss.item() == 0.0
        assert not any(grad.any() for grad in gradients(model, loss).values())


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi"])
def test_label_smoothing_and_z_loss(name):
    """Against their formulas on the model's own logits."""
    theirs = make_model(name)
    ours = copy.deepcopy(theirs)
    fuse_lm_head(ours, label_smoothing=0.2, z_loss=0.01)
    batch = make_batch()
    targets = batch["labels"][:, 1:].flatten()
    logits = theirs(**batch).logits[:, :-1].flatten(0, 1)[targets != -100]
    smoothed = torch.nn.functional.cross_entropy(
        logits, targets[targets != -100], label_smoothing=0.2, reduction="sum"
    )
    expected = smoothed + 0.01 * logits.logsumexp(-1).square().sum()
    assert_same(ours, theirs, ours(**batch, num_items_in_batch=11).loss, expected / 11)


class LargestTensor(TorchDispatchMode):
    """Remember the most elements that any tensor made under it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_no_logits():
    """A fused step makes no tensor of N x V elements, nor half of one."""
    rows, vocab = 4 * 256, 20_011
    ids = torch.randint(3, vocab, (4, 256))
    largest = {}
    for fused in (True, False):
        model = make_model(vocab_size=vocab, max_position_embeddings=256)
        if fused:
            fuse_lm_head(model, label_smoothing=0.1, z_loss=0.1, budget_bytes=16 * 2**20)
        with LargestTensor() as watch:
            model(input_ids=ids, labels=ids).loss.backward()
        largest[fused] = watch.elements
    assert largest[False] >= rows * vocab - vocab
    assert largest[True] < rows * vocab / 2


def text_dataset(count: int = 24) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(count):
        ids = torch.randint(3, V, (T,), generator=generator)
        ignored = int(torch.randint(0, 6, (), generator=generator))
        labels = ids.masked_fill(torch.arange(T) < ignored, -100)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def train(model, folder, **changes) -> tuple[list[float], dict, Trainer]:
    values = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    rows = text_dataset()
    arguments = TrainingArguments(**{**values, **changes})
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:6])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate(), trainer


def test_trainer_in_bf16(tmp_path):
    """Trainer wraps the fused forward in autocast; undoing it afterwards leaves a whole model."""
    theirs = make_model()
    ours = copy.deepcopy(theirs)
    handle = fuse_lm_head(ours)
    found, expected = (train(model, tmp_path, bf16=True)[0] for model in (ours, theirs))
    assert found == pytest.approx(expected, rel=2e-2)
    handle.undo()
    assert ours(**make_batch()).logits is not None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(smoothing, tmp_path):
    """Training, evaluation and generation are those of Trainer's own loss."""
    theirs = make_model()
    ours = copy.deepcopy(theirs)
    fuse_lm_head(ours, label_smoothing=smoothing)
    found, evaluated, trainer = train(ours, tmp_path)
    expected, reference, _ = train(theirs, tmp_path, label_smoothing_factor=smoothing)
    assert len(found) == 3 and found[0] != found[2]
    assert found == pytest.approx(expected, rel=1e-4)
    assert evaluated["eval_loss"] == pytest.approx(reference["eval_loss"], rel=1e-4)
    predicted = trainer.predict(text_dataset(4))
    assert not predicted.predictions
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-4, rtol=1e-3)
    prompt = make_batch()["input_ids"]
    generated = [
        model.eval().generate(prompt, max_new_tokens=4, do_sample=False) for model in (ours, theirs)
    ]
    assert torch.equal(*generated)


def test_undo():
    model = make_model()
    own = types.MethodType(type(model).forward, model)
    for instance in (None, own):
        if instance is not None:
            # such as an engine's hook
            model.forward = instance
        before = dict(vars(model))
        handle = fuse_lm_head(model)
        assert fuse_lm_head(model) is handle
        with pytest.raises(
            ValueError, match=r"^fuse_lm_head: model must be fused with the settings it has, Fused"
        ):
            fuse_lm_head(model, z_loss=0.1)
        assert model(**make_batch()).logits is None
        handle.undo()
        handle.undo()
        assert vars(model) == before
        assert vars(model).get("forward") is instance
        with fuse_lm_head(model, z_loss=0.1) as second:
            assert second is not handle and model(**make_batch()).logits is None
        assert vars(model).get("forward") is instance
        assert model(**make_batch()).logits is not None


def test_undo_below_a_wrapper():
    """An engine's wrapper stays; what it wraps is the model's own forward again."""
    model = make_model()
    handle = fuse_lm_head(model)
    inner = model.forward

    def wrapper(self, *args, **inputs):
        return inner(*args, **inputs)

    model.forward = types.MethodType(wrapper, model)
    handle.undo()
    assert model(**make_batch()).logits is not None
    assert fuse_lm_head(model, z_loss=0.1) is handle
    assert model(**make_batch()).logits is None
    model.forward = inner
    handle.undo()
    assert "forward" not in vars(model)


def test_deepcopy():
    """A copy is fused by itself and has a handle of its own."""
    model = make_model()
    handle = fuse_lm_head(model)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        torch.nn.init.zeros_(parameter)
    loss = twin(**make_batch()).loss
    assert loss.item() == pytest.approx(math.log(V))
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    other = fuse_lm_head(twin)
    assert other is not handle
    handle.undo()
    assert twin(**make_batch()).logits is None and model(**make_batch()).logits is not None
    other.undo()
    assert "forward" not in vars(twin)


@pytest.mark.parametrize("tied", [True, False])
def test_checkpointing_and_autocast(tied):
    theirs = make_model(tie_word_embeddings=tied).train()
    ours = copy.deepcopy(theirs)
    for model in (ours, theirs):
        model.gradient_checkpointing_enable()
    fuse_lm_head(ours)
    batch = make_batch()
    assert_same(ours, theirs, ours(**batch).loss, theirs(**batch).loss)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(**batch).loss, theirs(**batch).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0, rtol=2e-2)
    found.backward()
    half = ours.to(torch.bfloat16)
    torch.testing.assert_close(half(**batch).loss, expected, atol=0, rtol=5e-2)


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "fsdp_head"])
def test_engines(engine, one_process):
    """The loss is computed inside the wrapped forward; a head sharded by itself is gathered."""
    theirs = make_model()
    ours = copy.deepcopy(theirs)
    fuse_lm_head(ours, label_smoothing=0.1)
    batch = make_batch()
    expected = ours(**batch).loss
    gradients_of = gradients(ours, expected)
    ours.zero_grad()
    wrapped = ours
    if engine == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(ours)
    else:
        mesh = init_device_mesh("cpu", (1,))
        if engine == "fsdp_head":
            fully_shard(ours.lm_head, mesh=mesh)
        fully_shard(ours, mesh=mesh)
    found = wrapped(**batch)
    assert found.logits is None
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    for name, parameter in ours.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(grad, gradients_of[name], msg=name)


def test_needs_no_trl():
    code = """
import sys

for name in ("trl", "peft"):
    sys.modules[name] = None
from transformers import LlamaConfig, LlamaForCausalLM
from spo_kernels.integrations import fuse_lm_head

shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=31, intermediate_size=16, **shape))
fuse_lm_head(model)
assert model.training and not any("trl" in name for name in sys.modules if sys.modules[name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("kind", ["body", "head", "two", "saved"])
def test_lora(kind, fused_first):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    if kind in ("head", "two"):
        settings["target_modules"] = ["q_proj", "lm_head"]
    if kind == "saved":
        settings["modules_to_save"] = ["lm_head"]
    config = LoraConfig(**settings)
    pair = []
    for fused in (True, False):
        model = make_model()
        if fused and fused_first:
            fuse_lm_head(model)
        torch.manual_seed(5)
        model = get_peft_model(model, config)
        if kind == "two":
            model.add_adapter("other", LoraConfig(**{**settings, "r": 2, "lora_alpha": 3}))
            model.base_model.set_adapter(["default", "other"])
        if fused and not fused_first:
            handle = fuse_lm_head(model)
            assert fuse_lm_head(model.get_base_model()) is handle
        pair.append(model.eval())
    ours, theirs = pair
    batch = make_batch()
    found, expected = ours(**batch), theirs(**batch)
    assert found.logits is None
    assert_same(ours, theirs, found.loss, expected.loss)
    if kind in ("head", "two"):
        assert any("lm_head" in n and p.grad is not None for n, p in ours.named_parameters())
    with ours.disable_adapter(), theirs.disable_adapter():
        without = ours(**batch).loss
        torch.testing.assert_close(without, theirs(**batch).loss, atol=1e-5, rtol=1e-5)
    assert not torch.isclose(without, found.loss)
    if kind != "saved":
        for model in pair:
            model.merge_adapter()
        torch.testing.assert_close(ours(**batch).loss, expected.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_dora": True}, "got DoraLinearVariant ('default'). Leave the head out of "),
        ({"lora_bias": True}, "got LoRA with lora_bias ('default'). "),
        (None, "got peft.tuners.ia3.layer.Linear. "),
    ],
)
def test_other_adapters_of_the_head(changes, text):
    from peft import IA3Config, LoraConfig, get_peft_model

    targets = {"target_modules": ["lm_head"]}
    if changes is None:
        config = IA3Config(**targets, feedforward_modules=[])
    else:
        config = LoraConfig(**targets, **changes)
    model = make_model("mistral")
    fuse_lm_head(model)
    wrapped = get_peft_model(model, config)
    start = "fuse_lm_head: the LM head's adapter must be plain LoRA, "
    for call in (lambda: wrapped(**make_batch()), lambda: fuse_lm_head(make_wrapped(config))):
        with pytest.raises(NotImplementedError) as caught:
            call()
        assert str(caught.value).startswith(start + text)


def make_wrapped(config):
    from peft import get_peft_model

    return get_peft_model(make_model("mistral"), config)


class OddLinear(torch.nn.Linear):
    """A head that computes something else, as quantised ones do."""

    def forward(self, hidden):
        return super().forward(hidden).relu()


def test_errors():
    shape = {**SHAPE, **CHANGES["llama"]}
    llama = AutoConfig.for_model("llama", **shape)
    bert = AutoConfig.for_model("bert", **SHAPE, is_decoder=True)
    bart = AutoConfig.for_model(
        "bart",
        **{"vocab_size": V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
        **{"decoder_attention_heads": 2, "encoder_attention_heads": 2},
        **{"encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    )
    encoder_decoder = copy.deepcopy(bart)
    electra = AutoConfig.for_model("electra", **SHAPE, is_decoder=True)
    odd, quantised, custom = make_model(), make_model(), make_model()
    odd.lm_head = OddLinear(16, V)
    quantised.lm_head.weight = torch.nn.Parameter(
        torch.zeros(V, 16, dtype=torch.int8), requires_grad=False
    )
    custom.loss_function = len
    doge = AutoConfig.for_model("doge", **SHAPE, is_moe=True)
    bodies = {
        "llama": AutoModel.from_config(llama),
        "classifier": AutoModelForSequenceClassification.from_config(llama),
        "seq2seq": AutoModelForSeq2SeqLM.from_config(encoder_decoder),
    }
    causal = {
        config.model_type: AutoModelForCausalLM.from_config(config)
        for config in (bert, bart, electra, doge)
    }
    known = "be a text-only causal language model of transformers"
    cases = [
        (torch.nn.Linear(2, 2), "be a transformers model or a PEFT model of one, got Linear"),
        (bodies["llama"], f"{known}, got LlamaModel"),
        (bodies["classifier"], f"{known}, got LlamaForSequenceClassification"),
        (bodies["seq2seq"], "be decoder-only, got BartForConditionalGeneration"),
        (causal["bart"], "take its loss from loss_function, got a loss of its own in BartForC"),
        (
            causal["bert"],
            "consist of a decoder and an LM head only, got BertLMHeadModel of bert, cls",
        ),
        (causal["electra"], "consist of a decoder and an LM head only, got ElectraForCausalLM of "),
        (causal["doge"], "balance its experts by their logits alone, got DogeForCausalLM"),
        (custom, "have ForCausalLMLoss as its loss_function, got len"),
    ]
    for model, text in cases:
        before = dict(vars(model))
        with pytest.raises((TypeError, NotImplementedError)) as caught:
            fuse_lm_head(model)
        assert str(caught.value).startswith(f"fuse_lm_head: model must {text}")
        assert vars(model) == before
    with pytest.raises(NotImplementedError, match=r"LM head must be a plain .* got .*OddLinear$"):
        fuse_lm_head(odd)
    with pytest.raises(
        NotImplementedError,
        match="^fuse_lm_head: the LM head's weight must be a plain floating-point tensor, got "
        "Parameter of torch.int8$",
    ):
        fuse_lm_head(quantised)
    for value in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got"):
            fuse_lm_head(make_model(), label_smoothing=value)
    for value in (-0.1, math.inf):
        with pytest.raises(ValueError, match="z_loss must be a finite float >= 0, got"):
            fuse_lm_head(make_model(), z_loss=value)
