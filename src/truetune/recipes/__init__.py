"""One ``run`` per command: the only place that knows how the parts fit together."""
