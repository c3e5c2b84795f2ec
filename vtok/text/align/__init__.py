"""Token-level alignment losses: pure functions over the log-probabilities of a policy and its reference."""
