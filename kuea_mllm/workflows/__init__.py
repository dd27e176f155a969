"""Several engines in a row: the quickstart and the multi-seed study."""
