"""Images unlike those that a model was trained on: found, and told why."""
