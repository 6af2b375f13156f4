"""TRL's own trainer tests, unpatched and under ``patch_trl()``: ``make trl-tests TRL_SOURCE=...``.

They name models and data sets of a hub. Here those names are folders below the working directory,
which transformers and datasets prefer: tiny models with random weights, a tokenizer that is trained
on the spot, rows that are made up. What cannot stand in (images, Qwen's own token ids) fails
without the patch as well; what passes without it and not with it is an error.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

FILES = (
    "experimental/test_cpo_trainer.py",
    "experimental/test_orpo_trainer.py",
    "experimental/test_tpo_trainer.py",
    "experimental/test_online_dpo_trainer.py",
    "experimental/test_a2po_trainer.py",
    "experimental/test_gmpo_trainer.py",
    "experimental/test_async_grpo_trainer.py",
    "test_dpo_trainer.py",
    "test_kto_trainer.py",
    "test_sft_trainer.py",
    "test_grpo_trainer.py",
    "test_rloo_trainer.py",
)
# an adapter on lm_head is refused by TRL and accepted by the patch
SELECTED = "not lm_head_raises"
SECONDS_PER_TEST = 180
ORG = "trl-internal-testing"
ROWS = 19
TEST_ROWS = 2

SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROUTED = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2}
# name on the hub -> model type, changes to SHAPE, chat template of TRL
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}, "qwen2_5"),
    "small-Qwen2ForCausalLM-2.5": ("qwen2", {"hidden_size": 32}, "qwen2_5"),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", {"num_labels": 1}, "qwen2_5"),
    "tiny-Qwen3ForCausalLM": ("qwen3", {}, "qwen3"),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", {"num_labels": 1}, "qwen3"),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {**ROUTED, "num_experts": 4}, "qwen3"),
    "tiny-LlamaForCausalLM-3": ("llama", {}, "llama3"),
    "tiny-LlamaForCausalLM-3.1": ("llama", {}, "llama3_1"),
    "tiny-LlamaForCausalLM-3.2": ("llama", {}, "llama3_2"),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", {"num_labels": 1}, "llama3_2"),
    "tiny-MistralForCausalLM-0.1": ("mistral", {}, "qwen2_5"),
    "tiny-MistralForCausalLM-0.2": ("mistral", {}, "qwen2_5"),
    "tiny-GemmaForCausalLM": ("gemma", {"head_dim": 2}, "gemma"),
    "tiny-Gemma2ForCausalLM": ("gemma2", {"head_dim": 2}, "gemma"),
    "tiny-CohereForCausalLM": ("cohere", {"logit_scale": 0.125}, "cohere"),
    "tiny-Cohere2ForCausalLM": ("cohere2", {"logit_scale": 1.0}, "cohere2"),
    "tiny-Phi3ForCausalLM": ("phi3", {}, "phi3"),
    "tiny-Olmo3ForCausalLM": ("olmo3", {}, "qwen2_5"),
    "tiny-GPTNeoXForCausalLM": ("gpt_neox", {}, None),
    "tiny-GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4}, "gptoss"),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", {**ROUTED, "n_routed_experts": 4}, "glm4moe"),
    "tiny-DeepseekV3ForCausalLM": (
        "deepseek_v3",
        {**LATENT, "num_key_value_heads": 4, "n_routed_experts": 16, "moe_intermediate_size": 32},
        "deepseekv3",
    ),
    "tiny-Lfm2ForCausalLM": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "lfm2"),
    "tiny-Lfm2ForCausalLM-2.5": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "lfm2_2_5"),
    "tiny-T5ForConditionalGeneration": (
        "t5",
        {"d_model": 8, "d_kv": 2, "d_ff": 32, "decoder_start_token_id": 0},
        None,
    ),
}


def make_hub(folder: Path) -> None:
    """Write every model and data set below ``folder`` under the name it has on the hub."""
    from tests.helpers.trl_tiny import made_pairs, make_tokenizer, texts_of

    rows = made_pairs(ROWS, plain=True)
    tokenizer = make_tokenizer(texts_of(rows))
    tokenizer.add_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    for name in MODELS:
        make_model(folder / ORG / name, name, tokenizer)
    configs = {
        f"{style}_{kind}": made
        for style, wrap in (("standard", lambda role, text: text), ("conversational", message))
        for kind, made in kinds_of_rows(rows, wrap).items()
    }
    make_data_set(folder / ORG / "zen", configs)


def make_model(folder: Path, name: str, tokenizer) -> None:
    import torch
    import transformers
    import trl

    kind, changes, template = MODELS[name]
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    vocab = {"vocab_size": len(tokenizer), "bos_token_id": None}
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **vocab, **special, **changes})
    auto = transformers.AutoModelForCausalLM
    if "num_labels" in changes:
        auto = transformers.AutoModelForSequenceClassification
    elif config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    model = auto.from_config(config).to(torch.bfloat16)
    for module in model.modules():
        # larger than most families' own, so that a few steps change every weight
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    model.save_pretrained(folder)
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = template and (templates / f"{template}.jinja").read_text("utf-8")
    tokenizer.save_pretrained(folder)


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text.strip()}]


def kinds_of_rows(rows: list[dict[str, str]], wrap) -> dict[str, list[dict]]:
    """Return the rows of every kind of data set that TRL knows, as text or as messages."""
    pairs, whole, unpaired = [], [], []
    for number, row in enumerate(rows):
        prompt = wrap("user", row["prompt"])
        sides = {side: wrap("assistant", row[side]) for side in ("chosen", "rejected")}
        pairs.append({"prompt": prompt, **sides})
        whole.append({side: prompt + sides[side] for side in sides})
        good = number % 2 == 0
        completion = sides["chosen" if good else "rejected"]
        unpaired.append({"prompt": prompt, "completion": completion, "label": good})
    column = "text" if isinstance(pairs[0]["prompt"], str) else "messages"
    return {
        "language_modeling": [{column: row["chosen"]} for row in whole],
        "prompt_only": [{"prompt": row["prompt"]} for row in pairs],
        "prompt_completion": [
            {"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs
        ],
        "preference": pairs,
        "implicit_prompt_preference": whole,
        "unpaired_preference": unpaired,
    }


def make_data_set(folder: Path, configs: dict[str, list[dict]]) -> None:
    """Write a data set of several configurations, each with a train and a test split."""
    entries = []
    for name, rows in configs.items():
        files = []
        for split, part in (("train", rows[:-TEST_ROWS]), ("test", rows[-TEST_ROWS:])):
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
            files.append({"split": split, "path": f"{name}/{split}.jsonl"})
        entries.append({"config_name": name, "data_files": files})
    # YAML holds JSON
    head = json.dumps({"configs": entries})
    (folder / "README.md").write_text(f"---\n{head}\n---\n", encoding="utf-8")


class Outcomes:
    """A pytest plugin: how each test ended, and none runs longer than ``SECONDS_PER_TEST``."""

    def __init__(self) -> None:
        self.of_test: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        def stop(*_):
            raise TimeoutError(f"longer than {SECONDS_PER_TEST} seconds")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(SECONDS_PER_TEST)
        try:
            return (yield)
        finally:
            signal.alarm(0)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.of_test[report.nodeid] = report.outcome


def run_tests(patched: bool, source: Path, hub: Path, files: list[str]) -> dict[str, str]:
    """Run TRL's tests in this process, which is patched for good."""
    # Liger needs a GPU, and what it does to a model's class spoils the tests that follow
    sys.modules["liger_kernel"] = None
    # a checkout's own trl must not come before the installed one
    import trl  # noqa: F401

    if patched:
        from spo_kernels.integrations import patch_trl

        patch_trl()
    os.chdir(hub)
    outcomes = Outcomes()
    paths = [str(source / "tests" / name) for name in files]
    options = ["-q", "-m", "not slow", "-k", SELECTED, "-p", "no:cacheprovider", "--tb=short"]
    # a file made for another version of TRL may not even import: the others run all the same
    options.append("--continue-on-collection-errors")
    pytest.main([*options, *paths], plugins=[outcomes])
    return outcomes.of_test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a checkout of TRL, of the installed version")
    parser.add_argument("files", nargs="*", default=FILES, help="test files, below its tests/")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        hub = Path(folder, "hub")
        # the processes below import what reads it
        os.environ["HF_HOME"] = str(Path(folder, "cache"))
        for patched in (False, True):
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                if not patched:
                    process.submit(make_hub, hub).result()
                arguments = (patched, options.source.resolve(), hub, options.files)
                found.append(process.submit(run_tests, *arguments).result())
    stock, ours = found
    kinds = ("passed", "failed", "skipped")
    print(f"{'file':45} unpatched: {', '.join(kinds)}; patched: {', '.join(kinds)}")
    for name in options.files:
        counts = [
            Counter(outcome for test, outcome in ends.items() if f"tests/{name}" in test)
            for ends in found
        ]
        print(f"{name:45}", *(f"{count[kind]:5}" for count in counts for kind in kinds))
    worse = [test for test, outcome in stock.items() if outcome == "passed" != ours.get(test)]
    print(*worse, sep="\n")
    if worse:
        sys.exit(f"{len(worse)} tests pass without the patch only")
    if "passed" not in stock.values():
        sys.exit("no test has passed without the patch")


if __name__ == "__main__":
    main()
