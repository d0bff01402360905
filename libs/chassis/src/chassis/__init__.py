"""The frame that every service stands in: errors, settings, lifecycle, health, gRPC, bus, telemetry and logs.

Knows no service and no wire message of Pressroom.
"""
