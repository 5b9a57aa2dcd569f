"""How good a judge is, and how far two agree."""
