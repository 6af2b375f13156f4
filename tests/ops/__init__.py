"""Tests of ``spo_kernels.ops``."""
