"""Training identity-conditioned diffusion models."""
