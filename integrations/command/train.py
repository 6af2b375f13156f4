"""`spo-kernels train`: parses TRL-style flags, checks everything, then trains with SPO."""

import difflib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import transformers
import yaml
from accelerate import PartialState
from datasets.exceptions import DatasetsError
from packaging.version import Version
from transformers import PretrainedConfig, Trainer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from spo_kernels import integrations
from spo_kernels.integrations.command.model_from_config import (
    folder_tokenizer,
    read_config,
    save_random_model,
    train_tokenizer,
)
from spo_kernels.integrations.data.preference_data import load_pairs, texts_of
from spo_kernels.integrations.spo.config import SPOSettings
from spo_kernels.integrations.spo.head_checkpoint import require_head

# where a model built from a config is saved inside OUTPUT_DIR
INITIAL_MODEL = "initial_model"

# alignment method -> the names of its config and its trainer, imported where they are needed
METHODS = {
    "dpo": ("SPOConfig", "SPOTrainer"),
    "kto": ("SPOKTOConfig", "SPOKTOTrainer"),
    "cpo": ("SPOCPOConfig", "SPOCPOTrainer"),
    "orpo": ("SPOORPOConfig", "SPOORPOTrainer"),
}

# raised by a mistake in flags, files or data, before training begins
SETUP_ERRORS = (
    DatasetsError,
    ImportError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    yaml.YAMLError,
)


@dataclass
class MethodArguments:
    """Which alignment loss the degree loss is added to."""

    method: str = field(
        default="dpo",
        metadata={
            "help": "Alignment method: its config decides which other flags there are. 'cpo' is "
            "also SimPO and AlphaPO, by --loss_type.",
            "choices": list(METHODS),
        },
    )


@dataclass
class RandomModelArguments:
    """A model with random weights instead of a trained one."""

    model_config: str | None = field(
        default=None,
        metadata={
            "help": "'tiny' or a folder with a config.json: train a model of that shape from "
            "random weights. It is saved to OUTPUT_DIR/initial_model before training."
        },
    )


class _Parser(TrlParser):
    """TRL's parser with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@dataclass(frozen=True)
class TrainJob:
    """A trainer whose every input was checked."""

    trainer: Trainer
    dataset_name: str

    def run(self) -> None:
        """Train, then save the model, and push it where that was asked for."""
        trainer, args = self.trainer, self.trainer.args
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(args.output_dir)
        trainer.accelerator.print(f"Model saved to {args.output_dir}")
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=self.dataset_name)
        # closes trackers; older versions close them by themselves
        if Version(transformers.__version__) >= Version("5.18.0"):
            trainer.end()


def make_parser(method: str = "dpo") -> TrlParser:
    """Return the parser of every flag that ``train`` has with this method."""
    config = getattr(integrations, METHODS[method][0])
    types = (MethodArguments, ScriptArguments, config, ModelConfig, RandomModelArguments)
    return _Parser(types, prog="spo-kernels train", allow_abbrev=False, usage="%(prog)s [flags]")


def prepare(arguments: Sequence[str]) -> TrainJob:
    """Return the job that ``arguments`` describe; nothing stays written where that fails.

    Raises:
        SETUP_ERRORS: one of them for a mistake in flags, data or model.
    """
    method, script, args, model, random_model = parse(arguments)
    output_dir = Path(args.output_dir)
    existed = output_dir.exists()
    if existed and not output_dir.is_dir():
        raise ValueError(f"--output_dir must be a folder, got the file {str(output_dir)!r}")
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None:
        if not Path(checkpoint).is_dir():
            raise ValueError(f"--resume_from_checkpoint must be a folder, got {checkpoint!r}")
        if args.gamma > 0:
            require_head(checkpoint)
    initial_model = output_dir / INITIAL_MODEL
    had_model = initial_model.exists()
    try:
        trainer = _make_trainer(method.method, script, args, model, random_model)
        return TrainJob(trainer, script.dataset_name)
    except BaseException:
        if not existed:
            shutil.rmtree(output_dir, ignore_errors=True)
        elif not had_model:
            shutil.rmtree(initial_model, ignore_errors=True)
        raise


def parse(
    arguments: Sequence[str],
) -> tuple[MethodArguments, ScriptArguments, SPOSettings, ModelConfig, RandomModelArguments]:
    """Return the five argument groups; unknown or contradicting flags raise ValueError."""
    # TRL's parser looks for the two-word form only
    words = []
    for word in arguments:
        words += ["--config", word.partition("=")[2]] if word.startswith("--config=") else [word]
    if words and words[-1] == "--config":
        raise ValueError("argument --config: expected one argument")

    parser = make_parser(method_of(words))
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        parser.set_defaults(use_cpu=True, bf16=False)
    *groups, from_file, unknown = parser.parse_args_and_config(
        words, return_remaining_strings=True, separate_remaining_strings=True
    )
    if unknown or from_file:
        raise ValueError(_unknown_flag((unknown or from_file)[0], parser))
    method, script, args, model, random_model = groups

    if script.dataset_name is None:
        raise ValueError("--dataset_name must be given: a hub id, a folder or a file of pairs")
    if (model.model_name_or_path is None) == (random_model.model_config is None):
        raise ValueError("exactly one of --model_name_or_path and --model_config must be given")
    if on_cpu:
        state = PartialState(cpu=args.use_cpu)
        state.print(f"No accelerator found: use_cpu={args.use_cpu}, bf16={args.bf16}")
    return method, script, args, model, random_model


def method_of(words: Sequence[str]) -> str:
    """Return the method that flags or their YAML file name, before there is a parser for it."""
    before = _Parser(add_help=False, allow_abbrev=False)
    before.add_argument("--method")
    before.add_argument("--config")
    found = before.parse_known_args(words)[0]
    method = found.method
    # a file that cannot be read is for TRL's parser to complain about
    if method is None and found.config is not None and Path(found.config).is_file():
        settings = yaml.safe_load(Path(found.config).read_text(encoding="utf-8"))
        method = settings.get("method") if isinstance(settings, dict) else None
    method = "dpo" if method is None else method
    if method not in METHODS:
        names = ", ".join(map(repr, METHODS))
        raise ValueError(f"--method must be one of {names}, got {method!r}")
    return method


def first_sentence(error: BaseException) -> str:
    """Return the first line of an error, with that of its cause where it names none itself."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, DatasetsError) and error.__cause__ is not None:
        text += f": {first_sentence(error.__cause__)}"
    return text


def _check_reachable(source: str, *, revision: str) -> None:
    """Raise ValueError where ``source`` is neither a model folder nor a model of the hub."""
    try:
        PretrainedConfig.get_config_dict(source, revision=revision)
    except OSError as error:
        raise ValueError(
            f"--model_name_or_path must be a model folder or a hub id that can be loaded, "
            f"got {source!r}: {first_sentence(error)}"
        ) from error


def _unknown_flag(word: str, parser: TrlParser) -> str:
    flags = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
    return f"unknown argument {word}" + (f", did you mean {near[0]}?" if near else "")


def _make_trainer(
    method: str,
    script: ScriptArguments,
    args: SPOSettings,
    model: ModelConfig,
    random_model: RandomModelArguments,
) -> Trainer:
    quantization = get_quantization_config(model)
    loads_model, placed = {"quantization_config": quantization}, {}
    if method in ("cpo", "orpo"):
        if quantization is not None:
            raise ValueError(
                f"--load_in_4bit and --load_in_8bit must be off with --method {method}, whose "
                "trainer of TRL does not load quantized models, got a quantization"
            )
        # they would also spread the model over the devices of a process
        loads_model, placed = {}, {"device_map": None}
    config = random_model.model_config and read_config(random_model.model_config)
    with args.main_process_first(desc="loading the dataset"):
        splits = [
            load_pairs(
                script.dataset_name,
                split=split,
                config=script.dataset_config,
                streaming=script.dataset_streaming,
                unpaired=method == "kto",
            )
            for split in (script.dataset_train_split, script.dataset_test_split)
            if split == script.dataset_train_split or args.eval_strategy != "no"
        ]
    args.model_init_kwargs = {
        **placed,
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    source = model.model_name_or_path
    if config is None:
        _check_reachable(source, revision=model.model_revision)
    else:
        # TRL reloads the reference model by path, so the random weights have to lie somewhere
        folder = Path(args.output_dir) / INITIAL_MODEL
        with args.main_process_first(desc="building the model"):
            if args.process_index == 0:
                tokenizer = folder_tokenizer(random_model.model_config) or train_tokenizer(
                    texts_of(splits[0]), vocab_size=config.vocab_size
                )
                save_random_model(config, tokenizer, folder, seed=args.seed)
        source = str(folder)
    return getattr(integrations, METHODS[method][1])(
        model=source,
        args=args,
        train_dataset=splits[0],
        eval_dataset=splits[1] if len(splits) > 1 else None,
        peft_config=get_peft_config(model),
        **loads_model,
    )
