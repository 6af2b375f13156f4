"""From texts to batches: key content and the collator."""
