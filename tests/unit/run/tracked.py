"""What trackers have written, read back from their files."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

Points = dict[str, list[tuple[float, Any]]]
"""By metric, (place on its axis, value) in the order in which they were sent."""


def tensorboard(directory: Path) -> tuple[Points, Points]:
    """Scalars and texts of the one TensorBoard run in a directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (home,) = {path.parent for path in directory.rglob("events*")}
    events = EventAccumulator(str(home), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {
        tag.removesuffix("/text_summary"): [
            (e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }
    return scalars, texts


def wandb_offline(directory: Path) -> tuple[set[str], Points]:
    """The ids of the W&B runs below a directory, and their history; tables are their rows."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids: set[str] = set()
    points: Points = defaultdict(list)
    for path in sorted(directory.rglob("run-*.wandb")):
        axes: list[tuple[str, str]] = []
        for data in _records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            elif record.HasField("metric") and record.metric.step_metric:
                axes.append((record.metric.glob_name.removesuffix("*"), record.metric.step_metric))
            elif record.HasField("history"):
                row: dict[str, Any] = {}
                for item in record.history.item:
                    key, *within = item.nested_key or [item.key]
                    value = json.loads(item.value_json)
                    row[key] = {**row.get(key, {}), within[0]: value} if within else value
                for key, value in row.items():
                    for prefix, axis in axes:
                        if key.startswith(prefix):
                            points[key].append((row[axis], _table(path.parent, value)))
    return ids, points


def _table(home: Path, value: Any) -> Any:
    if not isinstance(value, dict) or "path" not in value:
        return value
    table = json.loads((home / "files" / value["path"]).read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _records(data: bytes) -> list[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, of parts with a header of 7 bytes."""
    found, parts, position = [], b"", 7  # after W&B's own header
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(parts)
            parts = b""
    return found
