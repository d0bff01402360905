"""Finetuning: the domain, pure."""
