"""What a run shows: the metrics of its rounds, their plots, and the page."""
