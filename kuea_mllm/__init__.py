"""Align CLIP vision towers with KUEA and put them to use in multimodal LLMs.

Importing this package loads neither torch nor transformers; each submodule imports what it needs.
"""

__version__ = "0.1.0"
