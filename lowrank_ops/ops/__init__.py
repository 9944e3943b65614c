"""Autograd Functions, one file an op, and their registration with torch.library."""
