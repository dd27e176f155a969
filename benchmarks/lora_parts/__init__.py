"""Parts of the benchmark `lora_step.py`."""
