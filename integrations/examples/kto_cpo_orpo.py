"""The degree loss beside KTO, CPO (also SimPO and AlphaPO) or ORPO; the first word says which.

    python -m spo_kernels.integrations.examples.kto_cpo_orpo kto --output_dir kto
    python -m spo_kernels.integrations.examples.kto_cpo_orpo orpo --output_dir orpo
    python -m spo_kernels.integrations.examples.kto_cpo_orpo cpo --output_dir simpo \\
        --loss_type simpo --cpo_alpha 0 --simpo_gamma 0.5

`--gamma 0` trains the method alone. KTO takes pairs and turns each into two rows, or rows with
`prompt`, `completion` and `label`. CPO and ORPO have no reference model. Without a GPU add
`--use_cpu --bf16 False`.
"""

import sys

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from spo_kernels.integrations import (
    SPOCPOConfig,
    SPOCPOTrainer,
    SPOKTOConfig,
    SPOKTOTrainer,
    SPOORPOConfig,
    SPOORPOTrainer,
)

METHODS = {
    "kto": (SPOKTOConfig, SPOKTOTrainer),
    "cpo": (SPOCPOConfig, SPOCPOTrainer),
    "orpo": (SPOORPOConfig, SPOORPOTrainer),
}


def main() -> None:
    method, *flags = sys.argv[1:] or [""]
    if method not in METHODS:
        sys.exit(f"usage: kto_cpo_orpo.py {{{','.join(METHODS)}}} [flags]")
    config, trainer_type = METHODS[method]
    parser = TrlParser((ScriptArguments, config, ModelConfig))
    parser.set_defaults(
        model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct",
        dataset_name="trl-lib/ultrafeedback_binarized",
    )
    script, args, model = parser.parse_args_and_config(flags)
    rows = load_dataset(script.dataset_name, split=script.dataset_train_split)
    trainer = trainer_type(
        model.model_name_or_path, args=args, train_dataset=rows, peft_config=get_peft_config(model)
    )
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
