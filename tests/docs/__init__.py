"""Tests of documentation, notebooks, packaging and benchmarks."""
