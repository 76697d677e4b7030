"""Makes model repositories and random checkpoints, and verifies checkpoints."""
