"""Triton kernels, installed as `fastgen.kernels`: one file per op, its launchers and its `*_kernel` functions."""
