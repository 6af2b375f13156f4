"""Tests of ``spo_kernels.integrations.data``."""
