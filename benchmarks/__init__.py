"""Benchmarks of what lora-squeeze claims; `python -m benchmarks` runs them all."""
