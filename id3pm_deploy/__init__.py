"""Identity-conditioned diffusion models, from checkpoint to engine to picture."""

__version__ = "0.1.0"
