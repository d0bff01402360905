"""The local launcher and the `pressroom` command: starts the services as processes and imports none of them."""

__version__ = "0.1.0"
