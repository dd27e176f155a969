"""What a vision tower can do by itself: zero-shot, retrieval, linear and patch probes."""
