"""Finetuning and the model registry."""
