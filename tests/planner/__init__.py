"""Tests of ``spo_kernels.planner``."""
