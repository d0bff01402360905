"""Names and shapes that services share: the subjects table of the bus, and metadata and header names.

The generated protobuf code lies beside this package, under `pressroom`.
"""
