"""The generator measured: beside its peers, for what it promises, and against transformers. README.md explains."""
