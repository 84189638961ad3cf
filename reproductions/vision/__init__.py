"""A vision-language experiment with models and data that come as packages, on a processor."""
