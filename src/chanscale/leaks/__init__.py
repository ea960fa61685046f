"""The same exposure twice: near-duplicates of a set, and what they spoil."""
