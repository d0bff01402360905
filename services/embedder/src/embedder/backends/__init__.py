"""Outbound: the encoder runtimes, named by technology."""
