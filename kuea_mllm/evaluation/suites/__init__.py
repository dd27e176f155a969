"""Columns of the KUEA paper as tasks of lmms-eval, under named protocols."""
