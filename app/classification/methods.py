"""The methods that requests select: every adapter, and the recipes that share the adapter of zero-shot.

An adapter declares its own method (``Declaration`` in app/adapters/_base.py). ``CASED`` is the one method without
classes: it finds them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from app.adapters._base import Adapter, Declaration
from app.adapters._discovery import adapter_classes, options_of
from app.adapters._examples import ExampleAdapter, Need
from app.adapters.cosine import Cosine
from app.captions.cased.scoring import ALPHA
from app.classification.method_names import DISCOVERY_METHOD
from app.errors import FieldProblem, InvalidFieldError, did_you_mean
from app.prompting.recipes import RECIPES, MakeRecipe, Options
from app.types import Option

TRANSDUCTIVE = "transductive"
"""The option by which a method learns from the images of the request."""

# Methods that share the adapter of zero-shot and differ in the prompts that they read, with their options.
_PROMPT_METHODS: Mapping[Declaration, Mapping[str, Option]] = MappingProxyType(
    {
        Declaration(
            "cupl",
            "Cosine similarity with the mean of the class's descriptions, in place of templates"
            " (Pratt et al., ICCV 2023).",
            recipe="sentences",
            uses_descriptions=True,
        ): {},
        Declaration(
            "cupl-ensemble",
            "Cosine similarity with the mean of the class's templates and descriptions together"
            " (Pratt et al., ICCV 2023).",
            recipe="templates-and-sentences",
            uses_descriptions=True,
        ): {},
        Declaration(
            "dclip",
            "Mean of the cosines with the class's features, as in 'zebra, which has stripes'"
            " (Menon and Vondrick, ICLR 2023).",
            recipe="features",
            uses_descriptions=True,
        ): {},
        Declaration(
            "waffle",
            "Mean of the cosines with random features, the same for every class: a control for descriptions"
            " (Roth et al., ICCV 2023).",
            recipe="random-words",
            is_control=True,
        ): {
            "descriptors": Option(30, 2, 200, "Number of features, half words and half characters.", whole=True),
            "seed": Option(0, 0, 1_000_000, "Seed of the random draw.", whole=True),
        },
    }
)

# The order in which methods are listed; an adapter that is not named here comes after those, by its name.
_ORDER = (
    *("zero-shot", "cupl", "cupl-ensemble", "dclip", "autoclip", "waffle", "gda", "tip-adapter", "gda-em", "zlap"),
    *("inmap", "inmap+zlap", "tfup", "transclip", "stata", "tda"),
)

_POOL_OPTIONS = {
    TRANSDUCTIVE: Option(
        0, 0, 1, "1 learns from the images of the request, taken together, and not from stored ones.", whole=True
    )
}


@dataclass(frozen=True, slots=True)
class Method:
    """A way to classify: an adapter, and a recipe for the prompts that it reads.

    ``uses_descriptions`` says whether descriptions change its results, ``is_control`` whether it exists only to be
    compared with.
    """

    name: str
    summary: str
    recipe: MakeRecipe
    adapter_class: type[Adapter]
    options: Mapping[str, Option] = field(default_factory=dict)
    uses_descriptions: bool = False
    is_control: bool = False

    @property
    def learner(self) -> type[ExampleAdapter] | None:
        """The adapter's class if it takes one row per class and may learn from example images."""
        return self.adapter_class if issubclass(self.adapter_class, ExampleAdapter) else None

    @property
    def learns(self) -> frozenset[Need]:
        """The kinds of example images that it learns from."""
        return frozenset() if self.learner is None else self.learner.needs

    @property
    def transductive(self) -> bool:
        """Whether the result of an image depends on other images, unless an option says otherwise."""
        return self.learner is not None and self.learner.transductive

    @property
    def stateful(self) -> bool:
        """Whether a result may depend on earlier requests."""
        return self.learner is not None and self.learner.stateful

    def adapter(self, options: Options) -> Adapter:
        """Return a new adapter with the values of ``read_options``."""
        values = {
            name: int(options[name]) if option.whole else options[name]
            for name, option in options_of(self.adapter_class).items()
        }
        return self.adapter_class(**values)

    def example_adapter(self, options: Options) -> ExampleAdapter:
        """Return a new adapter of ``learner``."""
        adapter = self.adapter(options)
        assert isinstance(adapter, ExampleAdapter)
        return adapter

    def read_options(self, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """Return the values of all options, given or default, sorted by name.

        Raises:
            InvalidFieldError: the method has no such option, or a value is out of range.
        """
        return _read_options(self.name, self.options, given)


@dataclass(frozen=True, slots=True)
class VocabularyFree:
    """A way to classify without classes."""

    name: str
    summary: str
    options: Mapping[str, Option]

    def read_options(self, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """Return the values of all options; see ``Method.read_options``."""
        return _read_options(self.name, self.options, given)


def _read_options(
    method: str, options: Mapping[str, Option], given: Mapping[str, float]
) -> tuple[tuple[str, float], ...]:
    known = ", ".join(sorted(options)) or "none"
    problems = [
        FieldProblem(
            f"options.{name}", f"method '{method}' has no such option; known: {known}{did_you_mean(name, options)}"
        )
        for name in given
        if name not in options
    ]
    for name, option in options.items():
        value = given.get(name, option.default)
        if not option.minimum <= value <= option.maximum or (option.whole and value != int(value)):
            kind = "a whole number" if option.whole else "a number"
            problem = f"{value:g} is not {kind} from {option.minimum:g} to {option.maximum:g}"
            problems.append(FieldProblem(f"options.{name}", problem))
    if problems:
        raise InvalidFieldError(problems)
    return tuple((name, given.get(name, option.default)) for name, option in sorted(options.items()))


def _method(declaration: Declaration, adapter: type[Adapter], options: Mapping[str, Option]) -> Method:
    return Method(
        declaration.name,
        declaration.summary,
        RECIPES[declaration.recipe],
        adapter,
        options,
        uses_descriptions=declaration.uses_descriptions,
        is_control=declaration.is_control,
    )


def _declared(adapter: type[Adapter]) -> Method:
    learns_from_pool = issubclass(adapter, ExampleAdapter) and Need.POOL in adapter.needs
    return _method(adapter.declaration, adapter, {**options_of(adapter), **(_POOL_OPTIONS if learns_from_pool else {})})


def _all_methods() -> Mapping[str, Method]:
    methods = [_declared(adapter) for adapter in adapter_classes()]
    methods += [_method(declaration, Cosine, options) for declaration, options in _PROMPT_METHODS.items()]
    rank = {name: number for number, name in enumerate(_ORDER)}
    methods.sort(key=lambda method: (rank.get(method.name, len(_ORDER)), method.name))
    by_name = {method.name: method for method in methods}
    assert len(by_name) == len(methods), "two methods have the same name"
    return MappingProxyType(by_name)


METHODS: Mapping[str, Method] = _all_methods()
"""Every method with classes, by name, in the order in which they are listed."""

CASED = VocabularyFree(
    DISCOVERY_METHOD,
    "The words that captions near the image have in common, scored against the image; without labels (Conti et al.,"
    " NeurIPS 2023).",
    MappingProxyType(
        {
            "alpha": Option(ALPHA, 0, 1, "Weight of the image in a score; the rest is the weight of its captions."),
            "captions": Option(10, 1, 100, "How many captions to use, the nearest first.", whole=True),
            "phrases": Option(
                0, 0, 1, "1 also takes phrases of two and three words, as 'golden retriever'.", whole=True
            ),
            "min_images": Option(
                0,
                0,
                1000,
                "With `group`: how many images must have a name as their best one; 0 means one image in fifty.",
                whole=True,
            ),
        }
    ),
)
"""The method without classes."""
