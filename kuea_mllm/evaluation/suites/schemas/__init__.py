"""Readers of the data sets of the LLaVA suite, in the files that their authors publish."""
