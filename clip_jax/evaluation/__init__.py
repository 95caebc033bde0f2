"""Evaluation: numbers that others can line theirs up beside, and pictures of what is behind them."""
