"""The ops as nodes of a ``torch.compile`` graph."""
