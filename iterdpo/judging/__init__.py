"""The judge's contract, judging shard by shard, and statistics of judgments."""
