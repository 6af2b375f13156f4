"""Tests of ``spo_kernels.data``."""
