"""The methods that callers may name: what each reads of the classes, and the adapter that makes scores of it.

``CASED`` stands beside them: it is given no classes, and finds them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from app.adapters._base import Adapter
from app.adapters._examples import ExampleAdapter, Need
from app.adapters.auto_clip import AutoCLIP
from app.adapters.cosine import Cosine
from app.adapters.gda import GDA
from app.adapters.gda_em import GDAEM
from app.adapters.inmap import InMaP
from app.adapters.inmap_zlap import InMaPZLaP
from app.adapters.stat_a import StatA
from app.adapters.tda import TDA
from app.adapters.tfup import TFUP
from app.adapters.tip_adapter import TipAdapter
from app.adapters.trans_clip import TransCLIP
from app.adapters.zlap import ZLaP
from app.captions.cased.scoring import ALPHA
from app.errors import FieldProblem, InvalidFieldError
from app.prompting import recipes
from app.prompting.recipes import MakeRecipe, Options

AUTO = "auto"
"""Not a method: whichever of them the evidence is for."""

TRANSDUCTIVE = "transductive"
"""The option by which a method learns from the images of the request."""


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
    with, and not for use. ``learner`` is the class of an adapter that takes one row per class, and may learn from
    example images.
    """

    name: str
    summary: str
    recipe: MakeRecipe
    adapter: Callable[[Options], Adapter]
    options: Mapping[str, Option] = field(default_factory=dict)
    uses_descriptions: bool = False
    is_control: bool = False
    learner: type[ExampleAdapter] | None = None

    @property
    def learns(self) -> frozenset[Need]:
        """Which example images it learns from."""
        return frozenset() if self.learner is None else self.learner.needs

    @property
    def transductive(self) -> bool:
        """Whether an image's answer depends on other images, unless an option says otherwise."""
        return self.learner is not None and self.learner.transductive

    @property
    def stateful(self) -> bool:
        """Whether an answer may depend on what was asked before."""
        return self.learner is not None and self.learner.stateful

    def example_adapter(self, options: Options) -> ExampleAdapter:
        """Return a new adapter of ``learner``."""
        adapter = self.adapter(options)
        assert isinstance(adapter, ExampleAdapter)
        return adapter

    def read_options(self, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """Return every option, the defaults filled in, sorted by name.

        Raises:
            InvalidFieldError: an option that this method does not have, or a value out of its range.
        """
        return _read_options(self.name, self.options, given)


@dataclass(frozen=True, slots=True)
class VocabularyFree:
    """A way to classify without classes."""

    name: str
    summary: str
    options: Mapping[str, Option]

    def read_options(self, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """Return every option; as ``Method.read_options``."""
        return _read_options(self.name, self.options, given)


def _read_options(
    method: str, options: Mapping[str, Option], given: Mapping[str, float]
) -> tuple[tuple[str, float], ...]:
    known = ", ".join(sorted(options)) or "none"
    problems = [
        FieldProblem(f"options.{name}", f"method '{method}' has no such option; known: {known}")
        for name in given
        if name not in options
    ]
    for name, option in options.items():
        value = given.get(name, option.default)
        if not option.least <= value <= option.most or (option.whole and value != int(value)):
            kind = "a whole number" if option.whole else "a number"
            problem = f"{value:g} is not {kind} from {option.least:g} to {option.most:g}"
            problems.append(FieldProblem(f"options.{name}", problem))
    if problems:
        raise InvalidFieldError(problems)
    return tuple((name, given.get(name, option.default)) for name, option in sorted(options.items()))


def _cosine(_: Options) -> Adapter:
    return Cosine()


_POOL_OPTIONS = {
    TRANSDUCTIVE: Option(
        0, 0, 1, "1 learns from the images of the request, looked at together, and not from stored ones.", whole=True
    )
}


def _of_examples(
    summary: str,
    learner: type[ExampleAdapter],
    adapter: Callable[[Options], Adapter],
    options: Mapping[str, Option] = MappingProxyType({}),
    *,
    name: str,
) -> Method:
    pool = _POOL_OPTIONS if Need.POOL in learner.needs else {}
    return Method(name, summary, recipes.templates_only, adapter, {**options, **pool}, learner=learner)


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
            _of_examples(
                "Gaussian discriminant analysis of labelled images, added to zero-shot (Wang et al., ICLR 2024).",
                GDA,
                lambda options: GDA(options["alpha"]),
                {
                    "alpha": Option(
                        0, 0, 1e4, "Weight of the images beside the words; 0 chooses it by cross-validation."
                    )
                },
                name="gda",
            ),
            _of_examples(
                "Similarity to each labelled image, added to zero-shot (Zhang et al., ECCV 2022).",
                TipAdapter,
                lambda options: TipAdapter(options["alpha"], options["beta"]),
                {
                    "alpha": Option(0, 0, 1e4, "Weight of the images; 0 chooses it and beta by cross-validation."),
                    "beta": Option(5.5, 0.01, 100, "How fast an image's say falls with its distance."),
                },
                name="tip-adapter",
            ),
            _of_examples(
                "Gaussian discriminant analysis of unlabelled images by expectation maximisation, added to zero-shot"
                " (Wang et al., ICLR 2024).",
                GDAEM,
                lambda options: GDAEM(options["alpha"]),
                {"alpha": Option(1, 1e-4, 1e4, "Weight of the images beside the words.")},
                name="gda-em",
            ),
            _of_examples(
                "Labels spread from the words over a graph of unlabelled images (Stojnic et al., CVPR 2024).",
                ZLaP,
                lambda options: ZLaP(
                    k=int(options["k"]), gamma=options["gamma"], alpha=options["alpha"], keep=int(options["keep"])
                ),
                {
                    "k": Option(5, 1, 100, "Neighbours of each image.", whole=True),
                    "gamma": Option(5, 0.1, 20, "Power of the similarities between images and words."),
                    "alpha": Option(0.3, 0.01, 0.99, "How far labels spread."),
                    "keep": Option(0, 0, 1000, "Classes that are kept of each image; 0 keeps all.", whole=True),
                },
                name="zlap",
            ),
            _of_examples(
                "Words moved to where unlabelled images are (Qian et al., NeurIPS 2023).",
                InMaP,
                lambda _: InMaP(),
                name="inmap",
            ),
            _of_examples(
                "ZLaP from the rows that InMaP learns (Stojnic et al., CVPR 2024).",
                InMaPZLaP,
                lambda _: InMaPZLaP(),
                name="inmap+zlap",
            ),
            _of_examples(
                "Similarity to the unlabelled images that zero-shot is surest of, added to zero-shot"
                " (training-free unsupervised prompting, Long et al., 2024).",
                TFUP,
                lambda _: TFUP(),
                name="tfup",
            ),
            _of_examples(
                "A mixture of Gaussians of unlabelled images, tied to the words and to their neighbours"
                " (Zanella et al., NeurIPS 2024).",
                TransCLIP,
                lambda _: TransCLIP(),
                name="transclip",
            ),
            _of_examples(
                "The same, each class held at its words as long as few images are of it (Zanella et al., CVPR 2025).",
                StatA,
                lambda _: StatA(),
                name="stata",
            ),
            _of_examples(
                "Similarity to images seen before, of whose classes zero-shot was sure (Karmanov et al., CVPR 2024).",
                TDA,
                lambda _: TDA(),
                name="tda",
            ),
        )
    }
)


CASED = VocabularyFree(
    "cased",
    "The words that captions near the image have in common, scored against the image; without labels (Conti et al.,"
    " NeurIPS 2023).",
    MappingProxyType(
        {
            "alpha": Option(ALPHA, 0, 1, "Share of the image in a score; the rest is that of its captions."),
            "captions": Option(10, 1, 100, "Captions that are looked at, the nearest.", whole=True),
            "phrases": Option(
                0, 0, 1, "1 also takes phrases of two and three words, as 'golden retriever'.", whole=True
            ),
            "min_images": Option(
                0,
                0,
                1000,
                "With `group`: images that a name is the best of, at least; 0 is one in fifty of them.",
                whole=True,
            ),
        }
    ),
)
"""What classifies without classes."""
