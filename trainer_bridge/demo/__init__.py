"""`longtail train-demo`: a task, a model, the loop between an engine and a trainer, and its report."""
