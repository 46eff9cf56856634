"""Triton kernels, a module each; imported only where a kernel runs."""
