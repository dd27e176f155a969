"""Images and what is computed from them before a tower sees them."""
