"""Tests of ``spo_kernels.integrations.spo``."""
