"""Plans for pods that are not there: a run's own training step, compiled by the TPU's own compiler on this machine."""
