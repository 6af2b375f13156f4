"""``patch_trl``: TRL's own trainers without logits."""
