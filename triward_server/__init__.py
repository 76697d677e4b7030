"""What runs inside Triton: conversations in, rewards out. Start reading at `scoring.py`."""

__version__ = "0.1.0"
