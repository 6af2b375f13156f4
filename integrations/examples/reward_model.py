"""A reward model: a sequence classifier with one output, trained on pairs.

    python -m spo_kernels.integrations.examples.reward_model --output_dir reward --steps 1000

Pairs that say how far apart they are (columns `score_chosen`, `score_rejected`) are trained to at
least that margin with `--margin_scale` above 0.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from spo_kernels import bradley_terry_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--dataset", default="trl-lib/ultrafeedback_binarized")
    parser.add_argument("--output_dir", default="reward")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--margin_scale", type=float, default=0.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1, dtype=torch.float32
    )
    # the classifier reads the last token that is not padding
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(args.device)
    pairs = load_dataset(args.dataset, split="train").shuffle(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for step in range(args.steps):
        rows = [pairs[(4 * step + i) % len(pairs)] for i in range(4)]
        turns = [row.get("prompt", []) + row[k] for k in ("chosen", "rejected") for row in rows]
        inputs = tokenizer.apply_chat_template(
            turns, padding=True, truncation=True, max_length=1024, return_tensors="pt"
        )
        margins = None
        if args.margin_scale > 0:
            margins = torch.tensor([row["score_chosen"] - row["score_rejected"] for row in rows])
            margins = args.margin_scale * margins.to(args.device)
        rewards = model(**inputs.to(args.device)).logits  # [2P, 1]
        out = bradley_terry_loss(*rewards.chunk(2), margins, center_rewards_coefficient=0.01)
        loss = out.losses.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}  loss {loss:.4f}  accuracy {out.is_correct.float().mean():.2f}")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
