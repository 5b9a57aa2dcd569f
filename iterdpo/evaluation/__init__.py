"""What the held-out evaluation measures. Pure functions of scores, tokens, texts and log-probabilities.

metrics   all of them, as docs/metrics.md defines them      wins    win rates, their tests, and two judges' agreement
scores    mean scores, best of N, KL                        texts   diversity, loops, refusals

Intervals are percentile bootstrap intervals over prompts: prompts are what the evaluation drew at random, and
several completions of one prompt are not independent.
"""
