"""Tests of ``spo_kernels.integrations.trl_patch``."""
