"""Checkpoints that other code trained, taken as they are."""
