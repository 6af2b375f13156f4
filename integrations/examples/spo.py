"""SPO: TRL's DPO with the preference-degree loss beside it, all weights trained.

    python -m spo_kernels.integrations.examples.spo --output_dir spo --gamma 0.1 --num_degrees 4

Every field of SPOConfig (DPOConfig's and the degree loss's), ScriptArguments and ModelConfig is a
flag. The responses' key content is found with English stop words unless
`--key_content_stop_words` names others. Without a GPU add `--use_cpu --bf16 False`.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser

from spo_kernels.integrations import SPOConfig, SPOTrainer


def main() -> None:
    parser = TrlParser((ScriptArguments, SPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct",
        dataset_name="trl-lib/ultrafeedback_binarized",
    )
    script, args, model = parser.parse_args_and_config()
    pairs = load_dataset(script.dataset_name, split=script.dataset_train_split)

    trainer = SPOTrainer(model.model_name_or_path, args=args, train_dataset=pairs)
    trainer.train()
    trainer.save_model(args.output_dir)

    # what the degree head reads from a response, beside always guessing the commonest degree
    last = [entry for entry in trainer.state.log_history if "spo/degree_accuracy" in entry][-1]
    accuracy, chance = last["spo/degree_accuracy"], last["spo/degree_chance"]
    trainer.accelerator.print(f"degree accuracy {accuracy:.2f}, by guessing {chance:.2f}")


if __name__ == "__main__":
    main()
