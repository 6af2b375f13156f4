"""Naive eager versions of the ops: oracle of the tests and readable spec."""
