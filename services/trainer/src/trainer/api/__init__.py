"""Inbound: gRPC and the bus."""
