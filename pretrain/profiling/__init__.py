"""Where the time and the memory of a step go: `profile.start=20` (see config.py for the rest)."""
