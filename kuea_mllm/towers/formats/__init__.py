"""How towers lie in files: names of tensors, layouts, releases, and what each implies."""
