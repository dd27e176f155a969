"""Labelled and captioned data sets of the encoder-level suites, from local copies and hubs."""
