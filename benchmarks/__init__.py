"""Measurements of adapter_ext against what PyTorch offers, and against the machine's limits."""
