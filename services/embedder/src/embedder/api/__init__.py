"""Inbound: gRPC to core and back."""
