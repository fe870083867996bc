"""The Engine seam and its backends; importing this imports no runtime."""
