"""Recipes: what to do to a model, as typed data, and the schemes it can choose for a linear. No torch."""
