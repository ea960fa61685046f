"""A run in forms that people deploy: a graph with its preprocessing inside, a program, a page."""
