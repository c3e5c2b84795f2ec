"""Benchmarks, lmms-eval models and tasks, and reports."""
