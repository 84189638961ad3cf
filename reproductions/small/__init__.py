"""The papers' experiments with a model and data that come as packages, on a processor."""
