"""Tests of ``spo_kernels.integrations.lm_head``."""
