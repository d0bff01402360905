"""The domain: inputs, batching, pooling. Knows no gRPC and no runtime."""
