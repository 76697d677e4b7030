"""The engine: `Features` -> scores. Read `scoring.py` first."""
