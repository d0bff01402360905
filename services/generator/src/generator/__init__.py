"""The generator: turns prompts into streams of completion tokens."""
