"""The form of a prompt."""

TokensPrompt = dict
