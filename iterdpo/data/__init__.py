"""Prompts and preferences read, rendered to token ids, and paired."""
