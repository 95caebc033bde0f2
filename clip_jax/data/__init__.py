"""Pairs from storage to the host's memory. Nothing here imports jax: worker processes stay small."""
