"""A small causal language model trained on real text: the study's rows come from it."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from spo_kernels import linear_logprob

_SIDES = ("chosen", "rejected")
_END = "<|end|>"
_BATCH, _TOKENS = 8, 256


class Pair(NamedTuple):
    """Token ids of one preference pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The pairs a model sees, those it does not, and how often it sees each token in a response."""

    seen: list[Pair]
    unseen: list[Pair]
    counts: torch.Tensor  # [V]


def read_corpus(path: Path, vocab: int, pairs: int) -> Corpus:
    """Return a file's first pairs as token ids of a BPE tokenizer trained on the seen nine tenths.

    A line is one pair: ``prompt``, ``chosen`` and ``rejected``, each a list of messages.
    """
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:pairs]]
    texts = [
        tuple("\n".join(m["content"] for m in record[side]) for side in ("prompt", *_SIDES))
        for record in records
    ]
    cut = len(texts) * 9 // 10
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=1,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in texts[:cut] for text in row), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab:
        raise ValueError(f"read_corpus: vocab must be at most {found}, got {vocab}")
    end = tokenizer.token_to_id(_END)

    def encode(row: tuple[str, str, str]) -> Pair:
        prompt, chosen, rejected = (tokenizer.encode(text).ids for text in row)
        return Pair([end, *prompt, end], [*chosen, end], [*rejected, end])

    encoded = [encode(row) for row in texts]
    responses = [token for pair in encoded[:cut] for token in (*pair.chosen, *pair.rejected)]
    counts = torch.bincount(torch.tensor(responses), minlength=vocab)
    return Corpus(encoded[:cut], encoded[cut:], counts)


def make_model(vocab: int, hidden: int, layers: int) -> LlamaForCausalLM:
    """Return a model with random weights and a tied head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def train(model: LlamaForCausalLM, pairs: Sequence[Pair], epochs: int) -> None:
    """Train on prompts and responses of the pairs, next token by next token."""
    stream = [token for pair in pairs for part in pair for token in part]
    rows = torch.tensor(stream[: len(stream) // _TOKENS * _TOKENS]).view(-1, _TOKENS)
    batches = [order for _ in range(epochs) for order in torch.randperm(len(rows)).split(_BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    warmup = max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / len(batches)))
        ),
    )
    for order in batches:
        ids = rows[order]
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
        logps = linear_logprob(hidden, model.lm_head.weight, ids[:, 1:]).logps
        optimizer.zero_grad()
        (-logps.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def scored(
    model: LlamaForCausalLM, pairs: Sequence[Pair], prompt_tokens: int, response_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return hidden states [N, H], labels [N] and lengths of the responses, chosen first.

    Of a prompt the last tokens are read, of a response the first.
    """
    hidden, labels = [], []
    for pair in pairs:
        prompt = pair.prompt[-prompt_tokens:]
        for response in pair[1:]:
            ids = torch.tensor([*prompt, *response[:response_tokens]])
            states = model.model(input_ids=ids[None, :-1]).last_hidden_state[0]
            hidden.append(states[len(prompt) - 1 :])
            labels.append(ids[len(prompt) :])
    return torch.cat(hidden), torch.cat(labels), [len(part) for part in labels]
