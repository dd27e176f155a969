"""Vision towers: every format at the door, one Hugging Face model inside."""
