"""Recipes for scored pairs: a margin filter, reward goals in the prompt, an on-policy mix.

    python -m spo_kernels.integrations.examples.data_recipes --output pairs.jsonl \\
        --on_policy my/sampled_pairs

Rows need the columns `score_chosen` and `score_rejected`, as trl-lib/ultrafeedback_binarized has
them. What is written is plain pairs: train on them with any script here.
"""

import argparse

from datasets import load_dataset

from spo_kernels.integrations import RewardAugmentation, ScoreMarginFilter, mix_on_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="trl-lib/ultrafeedback_binarized")
    parser.add_argument("--on_policy", help="pairs whose responses your own model wrote")
    parser.add_argument("--on_policy_ratio", type=float, default=0.5)
    parser.add_argument("--min_margin", type=float, default=0.5)
    parser.add_argument("--output", default="pairs.jsonl")
    args = parser.parse_args()

    pairs = load_dataset(args.dataset, split="train")
    # arXiv:2404.14367: pairs whose scores differ clearly
    clear = pairs.filter(ScoreMarginFilter(args.min_margin))
    print(f"{len(clear)} of {len(pairs)} pairs have a margin of {args.min_margin} or more")
    if args.on_policy is not None:
        own = load_dataset(args.on_policy, split="train").filter(ScoreMarginFilter(args.min_margin))
        clear = mix_on_policy(own, clear, on_policy_ratio=args.on_policy_ratio, seed=0)
        print(f"{len(clear)} pairs mixed, a share of {args.on_policy_ratio} on-policy")
    # arXiv:2410.08067: each pair once for either response's score as the goal
    goals = clear.map(RewardAugmentation(), batched=True)
    goals.to_json(args.output)
    print(f"{len(goals)} rows written to {args.output}")


if __name__ == "__main__":
    main()
