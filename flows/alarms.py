"""Alarms of a served run: events on the Prefect server, and automations there that tell somebody of them.

An event is about one round. Its payload has `run`, `round`, and in an alarm `alarm` and `reason`. The automations are
the server's own, so they work without this process: a round on a machine that is gone is told as well, if the server
is elsewhere. They exist while the deployment is served.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from iterdpo.errors import ConfigError, reason
from iterdpo.escape import revealed
from iterdpo.run.rundir import RunDir

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.actions import ActionTypes

STARTED, ENDED = "iterdpo.round.started", "iterdpo.round.ended"
FAILED, NOT_PROMOTED = "iterdpo.round.failed", "iterdpo.gate.failed"
LONGEST = 2000
"""Characters of a reason."""

FORMS = (
    "give the URL of a webhook (https://...), that of a Slack webhook (https://hooks.slack.com/...), or a block of the Prefect "
    "server as TYPE/NAME (sendgrid-email/ops)"
)
BLOCK = re.compile(r"([a-z0-9-]+)/([a-z0-9-]+)")


class Told(NamedTuple):
    """What a target is told, as templates of Prefect's, which are closed where they are used."""

    alarm: str = "{{ event.payload.alarm"
    run: str = "{{ event.payload.run"
    round: str = "{{ event.payload.round"
    reason: str = "{{ event.payload.reason"


CRASHED = Told("{{ 'failed round'", "{{ flow_run.name", "{{ none", "{{ flow_run.state.message")
"""Of a flow run that its worker reports as crashed. The round is not known to the server."""


class Alarms(NamedTuple):
    """Where the events of a served deployment go. `Alarms(deployment.id, "nightly")`"""

    deployment: UUID | str
    run: str

    def tell(self, event: str, round: int, **more: Any) -> None:
        """Send an event about a round. A server that does not take it is no reason to end the round: that is logged."""
        from prefect.client.orchestration import get_client
        from prefect.events import Event, Resource

        if "reason" in more:
            more["reason"] = revealed(str(more["reason"]))[:LONGEST]
        resource = {"prefect.resource.id": f"{_resource(self.deployment)}.{round}", "prefect.resource.name": self.run}
        said = Event(
            event=event,
            occurred=datetime.now(UTC),
            resource=Resource.model_validate(resource),
            payload={"run": self.run, "round": round, **more},
        )
        try:
            with get_client(sync_client=True) as client:
                client.request("POST", "/events", json=[said.model_dump(mode="json")])
        except Exception as error:  # httpx's and Prefect's
            logging.getLogger(__name__).warning("the Prefect server did not take %s: %s", event, error)

    @contextmanager
    def of_failures(self, directory: RunDir) -> Iterator[None]:
        """Around the work of a trigger: an error that ends it is told, with the round that it ended."""
        try:
            yield
        except Exception as error:
            self.tell(FAILED, directory.next_round(), alarm="failed round", reason=reason(error))
            raise


def targets(notify: Sequence[str] = ()) -> list[str]:
    """These, and those in ITERDPO_NOTIFY, which are separated by spaces. No child process of this one sees the latter.

    Raises:
        ConfigError: one of them has none of the `FORMS`. Its value, which may be a secret, is not shown.
    """
    found = [*notify, *os.environ.pop("ITERDPO_NOTIFY", "").split()]
    for number, target in enumerate(found, 1):
        if not BLOCK.fullmatch(target) and not re.fullmatch(r"https?://[^\s/]+\S*", target):
            raise ConfigError(f"--notify, number {number}: not a target; {FORMS}")
    return found


def remove(name: str) -> None:
    """Remove the automations of the deployment FLOW/NAME from the server."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for kind in ("failed", "hung", "crashed"):
            for automation in client.read_automations_by_name(_automation(name, kind)):
                client.delete_automation(automation.id)


def create(deployment: UUID, name: str, notify: Sequence[str], *, hung_after: float, in_pool: bool = False) -> None:
    """Create the automations of the deployment `name` that tell each target of failed rounds, failed gates and rounds of more
    than `hung_after` hours. `in_pool`: also of a process that was killed, of which a worker tells the server alone.

    Raises:
        ConfigError: the server has no such block, or it cannot be used to tell anybody anything.
    """
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    match: Any = {"prefect.resource.id": f"{_resource(deployment)}.*"}
    failed = EventTrigger(
        match=match,
        for_each={"prefect.resource.id"},
        expect={FAILED, NOT_PROMOTED},
        posture=Posture.Reactive,
        threshold=1,
    )
    hung = EventTrigger(
        match=match,
        for_each={"prefect.resource.id"},
        after={STARTED},
        expect={ENDED, FAILED},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(hours=hung_after),
    )
    of_deployment: Any = {
        "prefect.resource.role": "deployment",
        "prefect.resource.id": f"prefect.deployment.{deployment}",
    }
    crashed = EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=of_deployment,
        for_each={"prefect.resource.id"},
        expect={"prefect.flow-run.Crashed"},
        posture=Posture.Reactive,
        threshold=1,
    )
    with get_client(sync_client=True) as client:
        blocks = [_block(client, target, f"iterdpo-{deployment}-{n}") for n, target in enumerate(notify)]
        late = f"it has not ended {hung_after:g} hours after it began"
        kinds = [
            ("failed", failed, Told()),
            ("hung", hung, Told(alarm="{{ 'hung round'", reason=f"{{{{ {late!r}")),
        ]
        if in_pool:
            kinds.append(("crashed", crashed, CRASHED))
        for kind, trigger, told in kinds:
            actions = [_action(*block, told) for block in blocks]
            client.create_automation(
                AutomationCore(name=_automation(name, kind), trigger=trigger, actions=actions, enabled=True)
            )


def _block(client: SyncPrefectClient, target: str, name: str) -> tuple[UUID, bool]:
    """The id of a target's block, which is saved if the target is a URL, and whether it is a plain webhook."""
    from prefect.blocks.core import Block
    from prefect.blocks.notifications import SlackWebhook
    from prefect.blocks.webhook import Webhook
    from prefect.exceptions import ObjectNotFound

    if named := BLOCK.fullmatch(target):
        try:
            document = client.read_block_document_by_name(named[2], named[1])
        except ObjectNotFound:
            raise ConfigError(
                f"--notify {target}: the Prefect server has no such block; create it on its page"
            ) from None
        capabilities = document.block_schema.capabilities if document.block_schema is not None else []
        if named[1] != "webhook" and "notify" not in capabilities:
            raise ConfigError(f"--notify {target}: a block of this type cannot send a notification")
        assert document.id is not None
        return document.id, named[1] == "webhook"
    slack = re.match(r"https://hooks\.slack\.com/", target)
    block: Block = (
        SlackWebhook(url=target) if slack else Webhook(url=target, headers={"Content-Type": "application/json"})
    )
    return cast("UUID", block.save(name, overwrite=True)), not slack


def _action(block: UUID, webhook: bool, told: Told) -> ActionTypes:
    """Tell a target."""
    from prefect.events.actions import CallWebhook, SendNotification

    if webhook:
        payload = ", ".join(f'"{name}": {template} | tojson }}}}' for name, template in told._asdict().items())
        return CallWebhook(block_document_id=block, payload=f"{{{payload}}}")
    subject = f"iterdpo: {told.run} }}}}, round {told.round} }}}}: {told.alarm} }}}}"
    return SendNotification(block_document_id=block, subject=subject, body=f"{told.reason} }}}}")


def _automation(name: str, kind: str) -> str:
    return f"iterdpo {name}: {kind}"


def _resource(deployment: UUID | str) -> str:
    return f"iterdpo.deployment.{deployment}.round"
