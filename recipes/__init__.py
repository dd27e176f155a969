"""Shipped recipes: YAML files by kind; `kuea_mllm.config.recipes` lists and loads them."""
