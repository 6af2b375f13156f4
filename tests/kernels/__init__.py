"""Tests of ``spo_kernels.kernels``."""
