"""Typed recipes: strict schemas, loading, overriding and writing. Never imports torch."""
