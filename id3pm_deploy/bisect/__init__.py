"""Which modules have to stay in float32 for a half-precision export to be accurate."""
