"""Checkpoints: networks as a value, and their files."""
