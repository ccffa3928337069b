"""The routes, one module per resource."""

from app.api.routes import (
    catalogue,
    classify,
    databases,
    descriptions,
    embeddings,
    evaluations,
    examples,
    health,
    hugging_face,
    jobs,
    label_sets,
    shipped_label_sets,
    thresholds,
)

ROUTERS = (
    classify.router,
    embeddings.router,
    label_sets.router,
    shipped_label_sets.router,
    examples.router,
    descriptions.router,
    evaluations.router,
    thresholds.router,
    databases.router,
    jobs.router,
    catalogue.router,
    health.router,
    hugging_face.router,
)
"""In the order of the OpenAPI document."""
