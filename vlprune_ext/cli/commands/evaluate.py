"""``vlprune evaluate``: what a model can do."""

from __future__ import annotations

from ..arguments import (
    Batch,
    DataSource,
    Debug,
    Device,
    Dtype,
    Json,
    Limit,
    Model,
    Objective,
    Seed,
    Split,
    read_data,
    read_model,
)
from ..terminal import quiet, show, show_json, table, working


def evaluate(
    model: Model,
    data: DataSource = "digits",
    split: Split = "test",
    limit: Limit = None,
    objective: Objective = None,
    seed: Seed = 0,
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the model by an objective, and its parameters, FLOPs and latency."""
    quiet()
    from ...report.words import NAMES, metric
    from ...workflow.measure import evaluate as evaluate_model
    from ...workflow.measure import measure

    loaded = read_model(model, device, dtype)
    test = read_data(loaded, data, split, limit, seed, objective)
    with working("evaluating"):
        numbers = evaluate_model(loaded.model, test, objective, batch_size=batch_size)
        numbers = {**numbers, **measure(loaded.model, test, objective)}
    if json:
        origin = test.origin
        show_json({"model": model, "data": origin, **numbers})
        return
    shown = table("", f"{test.name}, {test.split}, {test.n_images:,} images")
    for key, value in numbers.items():
        shown.add_row(NAMES.get(key, key.replace("_", " ")), metric(key, value))
    show("", shown)
