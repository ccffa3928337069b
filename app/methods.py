"""The methods that callers may name: what each reads of the classes, and the adapter that makes scores of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from app.adapters._base import Adapter
from app.adapters.auto_clip import AutoCLIP
from app.adapters.cosine import Cosine
from app.errors import FieldProblem, InvalidFieldError
from app.prompting import recipes
from app.prompting.recipes import MakeRecipe, Options


@dataclass(frozen=True, slots=True)
class Option:
    """A number that callers may choose."""

    default: float
    least: float
    most: float
    description: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """A way to classify.

    ``uses_descriptions`` tells whether descriptions change its answers; ``is_control`` that it is there to be compared
    with, and not for use.
    """

    name: str
    summary: str
    recipe: MakeRecipe
    adapter: Callable[[Options], Adapter]
    options: Mapping[str, Option] = field(default_factory=dict)
    transductive: bool = False
    uses_descriptions: bool = False
    is_control: bool = False

    def read_options(self, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """Return every option, the defaults filled in, sorted by name.

        Raises:
            InvalidFieldError: an option that this method does not have, or a value out of its range.
        """
        known = ", ".join(sorted(self.options)) or "none"
        problems = [
            FieldProblem(f"options.{name}", f"method '{self.name}' has no such option; known: {known}")
            for name in given
            if name not in self.options
        ]
        for name, option in self.options.items():
            value = given.get(name, option.default)
            if not option.least <= value <= option.most or (option.whole and value != int(value)):
                kind = "a whole number" if option.whole else "a number"
                problem = f"{value:g} is not {kind} from {option.least:g} to {option.most:g}"
                problems.append(FieldProblem(f"options.{name}", problem))
        if problems:
            raise InvalidFieldError(problems)
        return tuple((name, given.get(name, option.default)) for name, option in sorted(self.options.items()))


def _cosine(_: Options) -> Adapter:
    return Cosine()


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                "zero-shot",
                "Cosine with the mean of the class's templates (Radford et al., ICML 2021).",
                recipes.templates_only,
                _cosine,
            ),
            Method(
                "cupl",
                "Cosine with the mean of the class's descriptions, in place of templates (Pratt et al., ICCV 2023).",
                recipes.sentences_only,
                _cosine,
                uses_descriptions=True,
            ),
            Method(
                "cupl-ensemble",
                "Cosine with the mean of the class's templates and descriptions together (Pratt et al., ICCV 2023).",
                recipes.templates_and_sentences,
                _cosine,
                uses_descriptions=True,
            ),
            Method(
                "dclip",
                "Mean of the cosines with the class's features, as in 'zebra, which has stripes'"
                " (Menon and Vondrick, ICLR 2023).",
                recipes.features_only,
                _cosine,
                uses_descriptions=True,
            ),
            Method(
                "autoclip",
                "Weighted mean of the cosines with templates and groups of descriptions, the weights chosen for each"
                " image (Metzen et al., TMLR 2024).",
                recipes.aligned_prompts,
                lambda options: AutoCLIP(options["beta"]),
                options={
                    "beta": Option(0.85, 0.01, 1.0, "Share of the largest entropy that the weights keep; 1 is equal.")
                },
                uses_descriptions=True,
            ),
            Method(
                "waffle",
                "Mean of the cosines with random features, the same for every class: a control for descriptions"
                " (Roth et al., ICCV 2023).",
                recipes.random_words,
                _cosine,
                options={
                    "descriptors": Option(30, 2, 200, "How many, half words and half characters.", whole=True),
                    "seed": Option(0, 0, 1_000_000, "Another seed is another draw.", whole=True),
                },
                is_control=True,
            ),
        )
    }
)
