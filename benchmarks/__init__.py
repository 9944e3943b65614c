"""Benchmarks: ``python -m benchmarks.run CASE`` gates the accuracy of every provider, then times it."""
