"""Pairs from storage to the host's memory. Nothing here imports jax."""
