"""Scores of an MLLM by lmms-eval, and comparisons of two sets of scores that can be trusted.

`runner.evaluate` writes a results directory, `compare.compare_results` compares two of them. This
package alone imports lmms-eval, and only inside the functions and modules that run it: importing
`kuea_mllm.evaluation`, the plugin's manifest, the statistics or the comparison stays light.
"""
