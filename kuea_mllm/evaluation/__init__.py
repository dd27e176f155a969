"""Scores of an MLLM by lmms-eval, and comparisons of two sets of scores that can be trusted.

`runner.evaluate` writes a results directory, `comparing.compare.compare_results` compares two of
them. Only the folder `lmms` and the plugin import lmms-eval, and only inside the functions and
modules that run it: importing `kuea_mllm.evaluation`, the plugin's manifest, the statistics or the
comparison stays light. Which folder may import which: contract `evaluation-one-way` in
pyproject.toml.
"""
