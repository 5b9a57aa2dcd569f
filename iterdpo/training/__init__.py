"""Pairs to log-probabilities to a loss to a policy: one DPO round under accelerate, in a separate process."""
