"""Outbound: model runners and the tokenizer, named by technology."""
