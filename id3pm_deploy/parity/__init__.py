"""Proof that two computations of the same model agree, row by row on the same noise.

A comparison has two sides. The engine is what is judged; the reference is what it is
held against: PyTorch on a CHECKPOINT, the engine of a BUNDLE, or recorded golden data.
``run`` is what the command calls; everything else works on opened engines. Torch
and diffusers are imported only where a side is PyTorch.
"""
