"""The server's half of Triward: conversations in, rewards out. Read `engine/scoring.py` first."""

__version__ = "0.2.0"
