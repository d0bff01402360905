"""The child process that trains: python -m trainer.backends.lora.child RUN_FOLDER."""
