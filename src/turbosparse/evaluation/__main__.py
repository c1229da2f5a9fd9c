"""The command line of lm-evaluation-harness, which knows our engine as the model `turbosparse`.

python -m turbosparse.evaluation run --model turbosparse --model_args pretrained=PACKED --tasks …
"""

from lm_eval.__main__ import cli_evaluate

from turbosparse.evaluation import harness  # noqa: F401 (it registers the model)

cli_evaluate()
