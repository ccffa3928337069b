"""The captions of the default database: names of what everyday photographs show, as the package contains them."""

from collections.abc import Iterator, Mapping

from app.runtime.data_files import resources

NOTES = "Names of what everyday photographs show, written for Deixis"
LICENCE = "Apache-2.0"


def everyday_names() -> tuple[str, ...]:
    """Return the distinct names of ``prompts/everyday_words.txt``, which explains its form; the most common first."""
    lines = (resources("prompts") / "everyday_words.txt").read_text("utf-8").splitlines()
    kinds: list[str] = []

    def names() -> Iterator[str]:
        for line in lines:
            if not line or line.startswith("#"):
                continue
            name, has_kinds, listed = line.partition(": ")
            if not has_kinds:
                yield from line.split(", ")
                continue
            yield name
            kinds.extend(f"{kind} {name}" for kind in listed.split(", "))

    return tuple(dict.fromkeys([*names(), *kinds]))


def everyday_groups() -> Mapping[str, frozenset[str]]:
    """Return what each of the names is a kind of, in lower case, as ``prompts/everyday_groups.txt`` says."""
    lines = (resources("prompts") / "everyday_groups.txt").read_text("utf-8").splitlines()
    closures: list[frozenset[str]] = []
    groups: dict[str, frozenset[str]] = {}
    for line in lines:
        if line.startswith("#"):
            continue
        names, _, parents = line.partition(" < ")
        groups[names] = frozenset().union(*(closures[int(parent)] for parent in parents.split()))
        closures.append(groups[names].union(names.split(", ")))
    return {name: groups[name] for name in everyday_names()}
