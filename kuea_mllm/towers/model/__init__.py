"""A tower in memory: its module, its fingerprint, what it computes, its size and mixes."""
