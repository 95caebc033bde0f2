"""Training: the state, the compiled step, checkpoints, what is logged, and the loop that tells the story."""
