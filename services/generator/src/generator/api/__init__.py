"""Inbound: gRPC and the bus to core and back."""
