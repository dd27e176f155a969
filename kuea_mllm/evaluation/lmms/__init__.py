"""Where lmms-eval is run: its tasks, its evaluator, its other models, our model class."""
