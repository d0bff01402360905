"""The gateway under overload: what is answered in time, and who waits for whom."""
