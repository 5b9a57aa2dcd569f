"""The run directory, and what works in it: manifests, locks, child processes, progress, reading back."""
