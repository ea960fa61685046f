"""Repeated cross-validation by patient: a finished run for each fold, and what they come to together."""
