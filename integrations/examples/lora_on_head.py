"""A LoRA adapter on the LM head in DPO, which TRL refuses by itself and `patch_trl` allows.

    python -m spo_kernels.integrations.examples.lora_on_head --output_dir dpo_lora_head

The adapter's term is part of the fused product, the reference pass leaves it out. `patch_trl` does
the same for KTO, SFT, GRPO, RLOO and AsyncGRPO. The default model has a head of its own, not tied
to the input embeddings. Without a GPU add `--use_cpu --bf16 False`.
"""

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser

from spo_kernels.integrations import patch_trl


def main() -> None:
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="Qwen/Qwen2.5-7B-Instruct",
        dataset_name="trl-lib/ultrafeedback_binarized",
        learning_rate=1e-5,
    )
    script, args, model = parser.parse_args_and_config()
    pairs = load_dataset(script.dataset_name, split=script.dataset_train_split)
    adapter = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM"
    )

    with patch_trl():
        trainer = DPOTrainer(
            model.model_name_or_path, args=args, train_dataset=pairs, peft_config=adapter
        )
        trainer.train()
    # the adapter alone: by default PEFT saves both embedding matrices with an adapter on the head
    trainer.model.save_pretrained(args.output_dir, save_embedding_layers=False)
    trainer.processing_class.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
