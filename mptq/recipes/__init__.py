"""Recipes, which define how to quantize a model, and the schemes that they can assign to a linear. No torch."""
