"""The degree loss from its definition: plain loops, one plain forward pass per sequence."""

import torch
import torch.nn.functional as F


def pooled_views(trainer, row: dict, side: str) -> dict[int, torch.Tensor]:
    """Return view -> pooled state of one response; views that nothing is left of are left out."""
    model = trainer._pretrained_model()

    def states(ids, start):
        return model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, start:]

    length = trainer.args.max_length
    prompt_ids = row[f"{side}_prompt_ids" if f"{side}_prompt_ids" in row else "prompt_ids"]
    ids = (prompt_ids + row[f"{side}_ids"])[:length]
    whole = states(ids, len(prompt_ids))
    if trainer.args.view == "hidden":
        levels = torch.tensor(row[f"{side}_removal_levels"][: len(whole)])
        views = {0: whole} | {
            k: whole[(levels == 0) | (levels > k)]
            for k in range(1, trainer.args.num_degrees)
            if (levels == k).any()
        }
    else:
        views, before = {0: whole}, ids
        shortened = zip(row[f"{side}_view_ids"], row[f"{side}_view_starts"], strict=True)
        for k, (completion_ids, start) in enumerate(shortened, start=1):
            ids = (prompt_ids[:start] + completion_ids)[:length]
            if completion_ids and len(ids) > start and ids != before:
                views[k], before = states(ids, start), ids
    last = trainer.args.pooling == "last"
    return {k: kept[-1] if last else kept.mean(dim=0) for k, kept in views.items()}


def naive_metrics(trainer, rows) -> dict[str, float | torch.Tensor]:
    """Return the metrics of an evaluation over ``rows`` from plain loops over one response each."""
    head, sides = trainer._degree_head, trainer._sides
    total, correct, counted, empty = torch.zeros(()), 0, [0] * trainer.args.num_degrees, 0
    for row in rows:
        for number, side in enumerate(sides):
            views = pooled_views(trainer, row, side)
            if len(views) == 1:
                empty += 1
                continue
            chunk = 0 if trainer.args.share_degree_head else number
            weight = head.weight.split(trainer.args.num_degrees)[chunk]
            bias = head.bias.split(trainer.args.num_degrees)[chunk]
            states = torch.stack(list(views.values()))
            if trainer.args.center_views:
                states = states - states.mean(dim=0)
            logits, degrees = F.linear(states, weight, bias), torch.tensor(list(views))
            total = total + F.cross_entropy(logits, degrees)
            correct += (logits.argmax(dim=1) == degrees).sum().item()
            for view in views:
                counted[view] += 1
    return {
        "degree_loss": total / len(rows),
        "degree_accuracy": correct / sum(counted),
        "degree_chance": max(counted) / sum(counted),
        "no_key_content": empty / (len(sides) * len(rows)),
    }


def randomize_head(trainer) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer._degree_head.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
