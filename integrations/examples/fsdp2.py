"""SPO on several GPUs with FSDP2: `accelerate launch` starts the processes, the code is the same.

    configs=$(python -c 'import spo_kernels.integrations as i; print(i.__path__[0])')
    accelerate launch --config_file $configs/accelerate_configs/fsdp2.yaml --num_processes 8 \\
        -m spo_kernels.integrations.examples.fsdp2 --output_dir spo_fsdp2

Parameters, gradients and optimizer are sharded by torch; the LM head is gathered once a forward
call. ddp.yaml, zero2.yaml and zero3.yaml beside that file start the same script. Tested so far in
two processes on a CPU, not on more than one GPU.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser

from spo_kernels.integrations import SPOConfig, SPOTrainer


def main() -> None:
    parser = TrlParser((ScriptArguments, SPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="Qwen/Qwen2.5-7B-Instruct",
        dataset_name="trl-lib/ultrafeedback_binarized",
    )
    script, args, model = parser.parse_args_and_config()
    # one process prepares the rows, the others read them from its cache
    with args.main_process_first(desc="loading the dataset"):
        pairs = load_dataset(script.dataset_name, split=script.dataset_train_split)

    trainer = SPOTrainer(model.model_name_or_path, args=args, train_dataset=pairs)
    state = trainer.accelerator.state
    trainer.accelerator.print(f"{state.distributed_type.value}, {state.num_processes} processes")
    trainer.train()
    # gathers the shards; one process writes them
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
