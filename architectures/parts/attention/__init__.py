"""Attention: what is seen, the products and their kernels, the cache."""
