"""Costs as files, so that what was measured on one day plans the runs of the next."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.network import ModelConfig
from pipeline.costs.operation_costs import (
    FAMILIES,
    KINDS,
    BatchShape,
    Costs,
    CostsError,
    Family,
    Link,
    OperationCost,
)
from pipeline.graph import Kind
from pipeline.json_file import read_json, write_json

KIND, VERSION = "costs", 1


def save_costs(path: Path, costs: Costs) -> None:
    """Write a costs file, whole or not at all; an unlimited link has `bytes_per_s` null."""
    link = asdict(costs.link)
    link["bytes_per_s"] = None if math.isinf(costs.link.bytes_per_s) else costs.link.bytes_per_s
    content = {
        "origin": costs.origin,
        "model": asdict(costs.model),
        "batch": asdict(costs.batch),
        "precision": costs.precision,
        "link": link,
        "operations": {
            family: {
                kind: asdict(costs.operations[family, kind])
                for kind in KINDS
                if (family, kind) in costs.operations
            }
            for family in FAMILIES
        },
    }
    write_json(path, KIND, VERSION, content)


def load_costs(path: Path) -> Costs:
    """Read a costs file; raises CostsError."""
    content = read_json(path, KIND, VERSION, CostsError)
    try:
        costs = _costs(content)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise CostsError(
            f"{path} is damaged ({type(problem).__name__}: {problem}); measure the costs again"
        ) from None
    _check_complete(path, content["operations"])
    return costs


def _check_complete(path: Path, operations: dict[str, Any]) -> None:
    """Raise CostsError if a family was left out; one that is free is there without operations."""
    for family in FAMILIES:
        needed = KINDS[:1] if family == "loss" else KINDS
        given = operations.get(family)
        missing = [kind for kind in needed if given is None or (given and kind not in given)]
        if missing:
            raise CostsError(
                f"{path} has no costs for {', '.join(missing)} of the family {family}; measure the "
                "costs again, or write an empty family if it takes no time"
            )


def _costs(content: dict[str, Any]) -> Costs:
    operations: dict[tuple[Family, Kind], OperationCost] = {}
    for family in FAMILIES:
        for kind in KINDS:
            if kind in content["operations"].get(family, {}):
                operations[family, kind] = _checked(content["operations"][family][kind])
    return Costs(
        model=ModelConfig(**content["model"]),
        batch=BatchShape(**content["batch"]),
        operations=operations,
        link=_link(content["link"]),
        precision=str(content["precision"]),
        origin=str(content["origin"]),
    )


def _checked(seconds: dict[str, Any]) -> OperationCost:
    cost = OperationCost(**{name: float(value) for name, value in seconds.items()})
    for name, value in asdict(cost).items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} is {value}")
    return cost


def _link(content: dict[str, Any]) -> Link:
    rate = content["bytes_per_s"]
    link = Link(
        float(content["latency_s"]), math.inf if rate is None else float(rate), content["shared_by"]
    )
    if link.latency_s < 0.0 or link.bytes_per_s <= 0.0:
        raise ValueError(f"link is {content}")
    if link.shared_by not in ("pair", "sender", "none"):
        raise ValueError(f"shared_by is {link.shared_by!r}")
    return link
