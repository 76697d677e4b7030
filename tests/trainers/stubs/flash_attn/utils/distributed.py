"""See the package."""

all_gather = None
