"""From a checkpoint to a step graph, and from a step graph to an engine."""
