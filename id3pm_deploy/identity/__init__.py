"""From a photo to the identity vector of a black-box face recognition model."""
