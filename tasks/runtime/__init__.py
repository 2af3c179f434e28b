"""Running stages under DVC and recording them in MLflow: nothing here is an input of a stage."""
