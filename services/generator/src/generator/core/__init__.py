"""The domain: requests, scheduling, sampling, stopping. Knows no gRPC and no model framework."""
