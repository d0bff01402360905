"""The fixtures that every test may ask for: real servers and the prepared models."""

pytest_plugins = ["testkit.fixtures"]
