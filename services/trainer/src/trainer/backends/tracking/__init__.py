"""Runs in MLflow: a process of its own mirrors them, since importing MLflow takes seconds and 240 MB."""
