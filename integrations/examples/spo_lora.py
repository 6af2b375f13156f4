"""SPO with a LoRA adapter; the trained model is saved merged, ready for `from_pretrained`.

    python -m spo_kernels.integrations.examples.spo_lora --output_dir spo_lora

The reference is the model without its adapter, so no second model is loaded, and the LM head is
frozen, whose log-probs cost two products a step in place of three or four. `view="text"` runs the
shortened responses through the model as well, in the same forward call. Without a GPU add
`--use_cpu --bf16 False`.
"""

from datasets import load_dataset
from peft import LoraConfig
from trl import ModelConfig, ScriptArguments, TrlParser

from spo_kernels.integrations import SPOConfig, SPOTrainer


def main() -> None:
    parser = TrlParser((ScriptArguments, SPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="Qwen/Qwen2.5-7B-Instruct",
        dataset_name="trl-lib/ultrafeedback_binarized",
        learning_rate=1e-5,
        view="text",
    )
    script, args, model = parser.parse_args_and_config()
    pairs = load_dataset(script.dataset_name, split=script.dataset_train_split)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    trainer = SPOTrainer(
        model.model_name_or_path, args=args, train_dataset=pairs, peft_config=adapter
    )
    trainer.train()
    merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    merged.save_pretrained(args.output_dir)
    trainer.processing_class.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
