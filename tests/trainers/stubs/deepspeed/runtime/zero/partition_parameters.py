"""See the package."""

ZeroParamStatus = None
