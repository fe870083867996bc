"""The PyTorch reference: the oracle that every engine is held against."""
