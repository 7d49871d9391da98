"""Ports for other libraries. Each file needs its library; nothing else in erasure_core does."""
