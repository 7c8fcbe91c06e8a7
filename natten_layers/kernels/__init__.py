"""Fused Triton kernels. Importing this package needs neither Triton nor a GPU; launching does."""
