"""A person as judge."""
