"""The model card's code as the oracle, and error budgets."""
