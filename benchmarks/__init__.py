"""Benchmarks of spo-kernels: workloads, providers, measurements, and the report made from them."""
