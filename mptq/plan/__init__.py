"""Everything that is known before the first tensor is read. No torch."""
