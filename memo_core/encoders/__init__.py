"""Frozen networks of others: they listen and look."""
