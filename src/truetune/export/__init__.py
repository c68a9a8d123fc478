"""From a base and an adapter to one model, without holding either in memory."""
