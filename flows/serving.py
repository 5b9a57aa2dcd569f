"""`iterdpo serve`: the flow `add_rounds` as a Prefect deployment, on this machine."""

from __future__ import annotations

from pathlib import Path

from flows.server import prefect_api
from iterdpo.config import Config
from iterdpo.errors import ConfigError
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import RunDir


def serve(
    config: Config,
    *,
    name: str | None = None,
    cron: str | None = None,
    timezone: str = "UTC",
    rounds: int = 1,
    progress: Progress,
) -> None:
    """Serve until interrupted. Each trigger, by the clock, the page or the API, adds `rounds` to the lineage.

    The Prefect server is the one that PREFECT_API_URL names, or one of our own that ends with this process.

    Raises:
        ConfigError: a cron string that is none.
        UserError: what `open_run` finds wrong with the configuration, before anything is served.
    """
    from flows.api import open_run
    from flows.iterative_dpo import add_rounds

    schedule = None
    if cron is not None:
        from prefect.schedules import Cron
        from pydantic import ValidationError

        try:
            schedule = Cron(cron, timezone=timezone)
        except (ValueError, ValidationError):
            raise ConfigError(
                f'--cron {cron!r} in {timezone}: not a cron string; "0 2 * * *" is two every night'
            ) from None
    open_run(config)  # what can be wrong is said now, not at two in the night
    name = name or Path(config.run_dir).name
    log = RunDir(config.run_dir).log_path("prefect")
    with prefect_api(log) as url:
        when = f"at {cron} ({timezone})" if cron else "when triggered"
        progress.say(f"serving add_rounds/{name}: {rounds} more {'round' if rounds == 1 else 'rounds'} {when}")
        progress.say(f"  trigger: PREFECT_API_URL={url} prefect deployment run add_rounds/{name}")
        progress.say(f"  page:    {url.removesuffix('/api')}")
        add_rounds.serve(
            name=name,
            parameters={"config": config.model_dump(), "rounds": rounds},
            print_starting_message=False,
            pause_on_shutdown=False,
            schedule=schedule,
        )
