"""Supervised fine-tuning with the plain Trainer of transformers, without logits.

    python -m spo_kernels.integrations.examples.fuse_lm_head --output_dir sft

Every field of TrainingArguments is a flag. `label_smoothing` and `z_loss` are `fuse_lm_head`'s:
leave Trainer's own `--label_smoothing_factor` at 0. Without a GPU add `--use_cpu`.
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from spo_kernels.integrations import fuse_lm_head


@dataclass
class ScriptArguments:
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    dataset: str = "trl-lib/Capybara"
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def main() -> None:
    script, args = HfArgumentParser(
        (ScriptArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    model = AutoModelForCausalLM.from_pretrained(script.model, dtype="float32")

    def tokenize(row):
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(row["messages"])["input_ids"]
        ignored = len(prompt["input_ids"])
        return {"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]}

    rows = load_dataset(script.dataset, split="train")
    rows = rows.map(tokenize, remove_columns=rows.column_names)
    # pads the labels with -100; a position without a label costs no product
    collator = DataCollatorForSeq2Seq(tokenizer)
    with fuse_lm_head(model, label_smoothing=script.label_smoothing, z_loss=script.z_loss):
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator)
        trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
