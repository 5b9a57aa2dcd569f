"""Judges that are networks run here: reward models, pair rankers, the implicit reward."""
