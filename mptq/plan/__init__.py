"""Everything that is known before the first tensor is read. Does not import torch."""
