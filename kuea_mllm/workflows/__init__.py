"""Several engines in a row: one module for each verb that needs them, and studies."""
