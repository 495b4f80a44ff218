"""Benchmark code, notes and results."""
