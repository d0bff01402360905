"""Outbound, named by technology."""
