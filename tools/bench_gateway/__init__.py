"""The gateway measured beside its peers, all in front of the same mock upstream."""
