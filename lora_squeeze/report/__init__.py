"""Records → something to look at. Reads numbers, computes nothing."""
