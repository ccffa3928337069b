"""The names of models, as settings and commands write them."""

from app.errors import ModelUnavailableError


def model_source(spec: str) -> tuple[str, str, str]:
    """Split a model's name into source, location and tag.

    The sources are ``open_clip`` (``architecture/tag``), ``hf-hub`` (``hf-hub:org/repo``), ``local-dir``
    (``local-dir:path``) and ``embedded``; only the first has a tag.

    Raises:
        ModelUnavailableError: the name has another form.
    """
    if spec == "embedded":
        return "embedded", "", ""
    scheme, colon, rest = spec.partition(":")
    if colon and scheme in {"hf-hub", "local-dir"} and rest:
        return scheme, rest, ""
    architecture, slash, tag = spec.partition("/")
    if slash and architecture and tag and not colon:
        return "open_clip", architecture, tag
    raise ModelUnavailableError(
        f"'{spec}' is not a model name; write embedded, architecture/tag (ViT-B-32/laion2b_s34b_b79k), hf-hub:org/repo"
        " or local-dir:path"
    )
