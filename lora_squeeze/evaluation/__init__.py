"""What an adapter does to its model, on data: loaded once, swapped in place, measured with intervals."""
