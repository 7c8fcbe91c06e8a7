"""The commands: training, sampling and text generation on top of natten_layers.

A package of its own, so that it loads before PyTorch does and the library holds nothing that only a program needs.
"""
