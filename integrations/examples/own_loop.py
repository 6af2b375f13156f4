"""DPO in a loop of your own, without TRL: one op from hidden states and LM head to the loss.

python -m spo_kernels.integrations.examples.own_loop --output_dir own_dpo --steps 1000
"""

import argparse

import torch
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from spo_kernels import linear_logprob, linear_preference_loss


def batch_of(rows, tokenizer):
    """Return ids and labels ``[2P, T]``, chosen first, padded on the right; labels are shifted."""
    ids, labels = [], []
    for turns in [row.get("prompt", []) + row[k] for k in ("chosen", "rejected") for row in rows]:
        whole = tokenizer.apply_chat_template(turns)["input_ids"]
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
        ids.append(torch.tensor(whole))
        labels.append(torch.tensor([-100] * (len(prompt) - 1) + whole[len(prompt) :] + [-100]))
    padded = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    return padded, pad_sequence(labels, batch_first=True, padding_value=-100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--dataset", default="trl-lib/ultrafeedback_binarized")
    parser.add_argument("--output_dir", default="own_dpo")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    frozen = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pairs = load_dataset(args.dataset, split="train").shuffle(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    for step in range(args.steps):
        rows = [pairs[(4 * step + i) % len(pairs)] for i in range(4)]
        ids, labels = (tensor.to(args.device) for tensor in batch_of(rows, tokenizer))
        with torch.no_grad():
            hidden = frozen.base_model(ids).last_hidden_state
            ref_logps = linear_logprob(hidden, frozen.lm_head.weight, labels).logps
        hidden = model.base_model(ids).last_hidden_state
        # a head with a bias, a softcap or a logit scale: bias=, softcap=, logit_scale= of both ops
        out = linear_preference_loss(hidden, model.lm_head.weight, labels, ref_logps, beta=0.1)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}  loss {out.loss:.4f}")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
