"""`iterdpo judge review`, and the pause in Prefect of a run that waits for a person's verdicts."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from iterdpo.errors import UserError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

CHECK_SECONDS = 2.0
"""How often a wait asks Prefect whether the run was cancelled."""


def serve_review(
    run_dir: str | Path, *, who: str | None = None, port: int = 0, open_browser: bool = True, once: bool = False
) -> None:
    """Serve the review page until interrupted, or, with `once`, until nothing is left to judge.

    Raises:
        UserError: there is no run, or the port is taken.
    """
    from judges.person.page import Desk, review_server

    root = Path(run_dir)
    if not (root / "run.json").exists() and not (root / "review").exists():
        raise UserError(f"{root}: no run here (no run.json)")
    desk = Desk(root, who=who)
    waiting = desk.pending()
    print(f"{waiting} {'pair' if waiting == 1 else 'pairs'} to judge in {root}")
    if once and not waiting:
        return
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(review_server(desk, port=port, title=root.absolute().name))
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; omit it to use a free one") from None
        print(f"review: {url}")
        print("  Ctrl-C ends it; finished verdicts are kept")
        # Without a screen the browser would come up in this terminal.
        if open_browser and (sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))):
            webbrowser.open(url)
        while not once or desk.pending():
            time.sleep(0.5)
        time.sleep(1.5)  # the page learns that it is done


@contextlib.contextmanager
def waiting(message: str, *, say: Callable[[str], None] = print) -> Iterator[Callable[[], None] | None]:
    """Around a wait for a person. Inside a Prefect flow run, it and the runs that it is part of are Paused meanwhile.

    Gives a function to call while waiting. It raises `Cancelled` once one of these runs was cancelled in Prefect.
    Resuming them there changes what Prefect shows and nothing else.
    """
    say(message)
    # Where nobody has imported Prefect there is no flow run, and importing it would take seconds.
    if "prefect" not in sys.modules:
        yield None
        return
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext
    from prefect.states import Paused, Running

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        yield None
        return
    with get_client(sync_client=True) as client:
        runs = _enclosing(client, context.flow_run.id)
        for run in runs:
            client.set_flow_run_state(run, Paused(message=message))
        asked = time.monotonic()

        def still_wanted() -> None:
            nonlocal asked
            if time.monotonic() - asked < CHECK_SECONDS:
                return
            asked = time.monotonic()
            # A server that is away for a while does not end a wait that may take days.
            with contextlib.suppress(httpx.HTTPError):
                _check_cancelled(client, runs)

        try:
            yield still_wanted
        finally:
            for run in reversed(runs):
                state = client.read_flow_run(run).state
                if state is not None and state.is_paused():
                    client.set_flow_run_state(run, Running())


def _enclosing(client: SyncPrefectClient, run: UUID) -> list[UUID]:
    """A flow run and those that it is a subflow of, the innermost first."""
    from prefect.exceptions import ObjectNotFound

    runs = [run]
    while (parent := client.read_flow_run(runs[-1]).parent_task_run_id) is not None:
        for attempt in range(20):  # Prefect records task runs some time after they began
            try:
                found = client.read_task_run(parent).flow_run_id
                break
            except ObjectNotFound:
                if attempt == 19:
                    return runs
                time.sleep(0.25)
        if found is None:
            break
        runs.append(found)
    return runs


def _check_cancelled(client: SyncPrefectClient, runs: list[UUID]) -> None:
    from prefect.exceptions import Abort
    from prefect.states import Cancelled as CancelledState

    class Cancelled(Abort, KeyboardInterrupt):
        """To Prefect, that the run's state is settled; to the command line, what Ctrl-C is."""

    states = [client.read_flow_run(run).state for run in runs]
    if any(state is not None and (state.is_cancelling() or state.is_cancelled()) for state in states):
        for run in runs:
            client.set_flow_run_state(run, CancelledState(message="cancelled while waiting for a person"), force=True)
        raise Cancelled("cancelled in Prefect")
