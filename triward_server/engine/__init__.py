"""From `Features` to scores. Read `scoring.py` first."""
