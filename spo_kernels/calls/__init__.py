"""Shared by all layers: state of a call, checks and error texts, the loss table, layout."""
