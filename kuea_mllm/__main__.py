"""`python -m kuea_mllm` is `kuea-mllm`."""

from kuea_mllm.cli.main import run

run()
