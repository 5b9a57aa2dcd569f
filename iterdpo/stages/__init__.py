"""The stages of a round as plain functions, a file each. They need no Prefect.

    sample     y_1..y_K ~ pi_t(.|x)           judge      a score for each y, or an abstention
    pair       (x, y_w, y_l)                  train      pi_{t+1} <- DPO(pi_t)
    evaluate   the candidate, on held-out x   gate       promote, keep or stop

A stage takes the run, the round and the handles of the stages before it (`iterdpo/run/artifacts.py`), and returns the
handle of what it made. Its file has `inputs`, the key of its step, which is pure, and the work. `Step`
(`iterdpo/run/rundir.py`) alone knows whether a step is done, stale or under way, and `plan.py` asks the keys alone.
"""
