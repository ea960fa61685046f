"""A search over the options of a fit, by validation images alone."""
