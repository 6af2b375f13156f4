"""Makes a model with random weights and its tokenizer, and saves both to a folder."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

PAD, TURN, END = "<|pad|>", "<|turn|>", "<|end|>"

# one turn is "<|turn|>role\ncontent<|end|>\n", so a prompt is always a prefix of the conversation
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '" + TURN + "' + message['role'] + '\\n' + message['content'] + '" + END + "\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + TURN + "assistant\\n' }}{%- endif -%}"
)


def tiny_config(vocab_size: int = 4096) -> PretrainedConfig:
    """Return the built-in shape ``tiny``: about two million parameters, trains on a CPU."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def read_config(name: str) -> PretrainedConfig:
    """Return the configuration ``tiny`` or the one in a folder (or file) with a config.json."""
    if name == "tiny":
        return tiny_config()
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"--model_config must be 'tiny' or a folder with a config.json, got {name!r}"
        )
    return AutoConfig.from_pretrained(file)


def folder_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that lies beside a config.json, if there is one."""
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    if name != "tiny" and (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    return None


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a chat template on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_random_model(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    seed: int,
) -> None:
    """Save a model of that shape with random fp32 weights, and its tokenizer, to ``folder``."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer must fit the model's vocabulary of {config.vocab_size}, "
            f"got {len(tokenizer)} tokens"
        )
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    set_seed(seed)
    # from_config would shard it under ZeRO-3, which waits for the other ranks
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
