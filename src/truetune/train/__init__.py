"""The optimizer's side: the loop, the step, the log."""
