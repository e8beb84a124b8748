"""The embedded reference model: its corpus, how it is trained, and its weights."""
