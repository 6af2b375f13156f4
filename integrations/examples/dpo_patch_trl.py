"""DPO with TRL's own trainer, without logits: `patch_trl` changes how tokens are scored, no more.

    python -m spo_kernels.integrations.examples.dpo_patch_trl --output_dir dpo

Every field of TRL's ScriptArguments, DPOConfig and ModelConfig is a flag, `--use_peft` (LoRA) too.
`--dataset_name` is a dataset of the hub or a folder of JSONL files; its rows have the columns
`chosen`, `rejected` and, unless both begin with it, `prompt`. Without a GPU add
`--use_cpu --bf16 False`.
"""

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from spo_kernels.integrations import patch_trl


def main() -> None:
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct",
        dataset_name="trl-lib/ultrafeedback_binarized",
    )
    script, args, model = parser.parse_args_and_config()
    pairs = load_dataset(script.dataset_name, split=script.dataset_train_split)

    with patch_trl() as patch:
        # built inside the block, so that it gets our fused head
        trainer = DPOTrainer(
            model.model_name_or_path,
            args=args,
            train_dataset=pairs,
            peft_config=get_peft_config(model),
        )
        for name, effect in patch.report().items():
            trainer.accelerator.print(f"{name}: {effect}")
        trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
