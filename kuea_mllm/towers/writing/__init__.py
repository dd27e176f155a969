"""Write a tower: as a Hugging Face directory, for open_clip or OpenAI, with its card."""
