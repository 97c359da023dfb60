"""Triton kernels of the CUDA path. Each also runs under Triton's interpreter on a CPU."""
