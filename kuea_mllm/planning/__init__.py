"""Memory, hours and disk of a run, by counting on tensors that hold no data."""
