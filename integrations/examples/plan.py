"""What the ops would do for a model and a batch, before any memory is allocated.

    python -m spo_kernels.integrations.examples.plan --hidden_size 4096 --vocab_size 128256 \\
        --pairs 4 --tokens 8192 --device cuda:sm_90

The planner is a pure function, so no GPU is needed. `--budget_mib` sets the workspace of one call.
`spo-kernels plan` prints the table for the models it knows and for a config.json.
"""

import argparse

import torch

from spo_kernels import plan_linear_logprob, plan_linear_preference_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden_size", type=int, default=4096)
    parser.add_argument("--vocab_size", type=int, default=128256)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="scored tokens of a response")
    parser.add_argument("--device", default="cuda:sm_90", help="cpu, cuda:sm_80, ...")
    parser.add_argument("--budget_mib", type=int, help="workspace of one call")
    args = parser.parse_args()

    call = {
        "hidden_size": args.hidden_size,
        "vocab_size": args.vocab_size,
        "dtype": torch.bfloat16,
        "device": args.device,
        "budget_bytes": None if args.budget_mib is None else args.budget_mib * 1024**2,
    }
    rows = 2 * args.pairs * args.tokens
    frozen = plan_linear_logprob(rows=rows, needs_grad=("hidden",), **call)
    trainable = plan_linear_logprob(rows=rows, needs_grad=("hidden", "weight"), **call)
    pair_rows = [(args.tokens, args.tokens)] * args.pairs
    whole_loss = plan_linear_preference_loss(pair_rows=pair_rows, **call)

    for head, plan in (("frozen", frozen), ("trainable", trainable), ("trainable", whole_loss)):
        cost = f"{plan.gemm_units} products, {plan.peak_bytes / 1024**3:.2f} GiB of workspace"
        print(f"{plan.op}, {head} head: {plan.strategy}, {cost}, {plan.time_ms:.0f} ms predicted")
    print(f"\nThe second was chosen from (* chosen, over: over the budget)\n{trainable.explain()}")


if __name__ == "__main__":
    main()
