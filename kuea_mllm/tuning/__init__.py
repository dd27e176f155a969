"""Tuning of an MLLM's language model: the data, so far."""
