"""Caption databases and searches in them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import Field

from app.api.schemas._base import Request, Response
from app.api.schemas.images import ImageBody
from app.captions.catalogue import DatabaseState
from app.captions.plan import BuildPlan
from app.captions.search import MAX_CONTAINS_CHARS, MAX_LIMIT, MAX_OFFSET, CaptionPage
from app.errors import InvalidFieldError
from app.names.class_names import MAX_ITEMS
from app.names.namespaces import namespace_of, own_name


class BuildDatabaseBody(Request):
    """What a caption database is to be built of: one of source, files and captions."""

    source: Literal["wordnet"] | None = Field(None, description="The nouns of WordNet.")
    files: list[Annotated[str, Field(min_length=1, max_length=4096)]] | None = Field(
        None,
        min_length=1,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="Below `DEIXIS_IMPORT_DIR`: text, CSV, TSV, JSON, JSON lines or Parquet, also `.gz` and `.zst`.",
        examples=[["products.csv.gz"]],
    )
    captions: list[str] | None = Field(
        None, min_length=1, max_length=MAX_ITEMS, fail_fast=True, description="The captions themselves."
    )
    model: str | None = Field(None, description="Whose text tower encodes them; the first served by default.")
    column: str | None = Field(
        None, min_length=1, max_length=200, description="Of CSV, TSV, JSON or Parquet; found by its name by default."
    )
    min_chars: int = Field(3, ge=1, le=10_000, description="Shorter captions are left out.")
    max_chars: int = Field(500, ge=1, le=10_000, description="Longer ones are cut.")
    latin_only: bool = Field(default=False, description="Leave out captions whose letters are not mostly Latin.")
    near_duplicates: float | None = Field(
        None,
        ge=0.5,
        le=1,
        description="Leave out captions whose cosine with one shortly before them is above this, as 0.97.",
    )
    recall: float = Field(
        0.95, gt=0, le=1, description="Share of the nearest captions that a search of a large database should find."
    )
    source_notes: str = Field("", max_length=2000, description="Where the captions are from.")
    licence: str = Field("", max_length=2000, description="Of the captions.")

    def plan(self, default_model: str) -> BuildPlan:
        """Return what is asked.

        Raises:
            InvalidFieldError: not one of source, files and captions.
        """
        given = {"source": self.source, "files": self.files, "captions": self.captions}
        if sum(each is not None for each in given.values()) != 1:
            raise InvalidFieldError.of("source", "give one of source, files and captions, to say what it is built of")
        return BuildPlan(
            model=self.model or default_model,
            files=tuple(self.files or ()),
            captions=tuple(self.captions or ()),
            **self.model_dump(exclude={"model", "files", "captions"}),
        )


class IndexBody(Response):
    """How a caption database is searched."""

    kind: str = Field(description="`flat`: every caption is compared; `ivf-pq`: those of some lists, by their codes.")
    lists: int
    probes: int = Field(description="Lists that a search reads.")
    code_bytes: int


class DatabaseBody(Response):
    """A caption database; what cannot be told of a damaged one is null."""

    name: str
    default: bool = Field(description="Whether it is asked where none is named.")
    model: str | None = Field(description="That encoded the captions.")
    models: list[str] = Field(description="Served models that it can be asked with.")
    captions: int | None
    dims: int | None
    index: IndexBody | None
    recall: dict[str, float] | None = Field(
        description="Share of the nearest captions that a search finds, by what was asked with: `near` and `far`"
        " captions, or `images`."
    )
    recall_at: int | None
    recall_target: float | None
    counts: dict[str, int] | None = Field(description="What became of the captions of the source.")
    source_notes: str | None
    licence: str | None
    bytes: int
    generation: str | None
    created_at: str | None
    problem: str | None = Field(description="Why it cannot be asked.")

    @classmethod
    def of(cls, state: DatabaseState, models: Sequence[str], *, default: bool) -> "DatabaseBody":
        """Return the database as it is told to callers."""
        manifest, problem = state.manifest, state.problem
        if manifest is not None and problem is None and not models:
            problem = f"it was made by '{manifest.model}', which is not served; serve it, or build it again"
        return cls(
            name=own_name(state.name),
            default=default,
            model=None if manifest is None else manifest.model,
            models=list(models),
            captions=None if manifest is None else manifest.captions,
            dims=None if manifest is None else manifest.dims,
            index=None if manifest is None else IndexBody(**asdict(manifest.index)),
            recall=None if manifest is None else dict(manifest.recall),
            recall_at=None if manifest is None else manifest.recall_at,
            recall_target=None if manifest is None else manifest.recall_target,
            counts=None if manifest is None else dict(manifest.counts),
            source_notes=None if manifest is None else manifest.source_notes,
            licence=None if manifest is None else manifest.licence,
            bytes=state.nbytes,
            generation=state.generation,
            created_at=None if manifest is None else manifest.created_at,
            problem=None if problem is None else namespace_of(state.name).hide(problem),
        )


class DatabaseList(Response):
    """Every caption database, by name."""

    databases: list[DatabaseBody]


class SearchFields(Request):
    """Which captions to return; the same fields in a form, in JSON and in a query string."""

    text: str | None = Field(None, description="Captions near this text.", examples=["a dog on a beach"])
    model: str | None = Field(None, description="The first served that the database can be asked with, by default.")
    limit: int = Field(10, ge=1, le=MAX_LIMIT, description="Captions on a page.")
    offset: int = Field(0, ge=0, le=MAX_OFFSET, description="`next_offset` of the page before.")
    contains: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CONTAINS_CHARS,
        description="Only captions with this in them, whatever the case; of the 1,000 nearest.",
    )
    min_score: float | None = Field(
        None, ge=-1, le=1, description="Only captions with at least this cosine; of the 1,000 nearest."
    )


class SearchBody(SearchFields):
    """A JSON request for captions."""

    image: ImageBody | None = Field(None, description="Or captions near this image.")


class FoundCaptionBody(Response):
    """A caption."""

    caption: str
    score: float = Field(description="Cosine with what was asked, in [-1, 1].")


class SearchResponse(Response):
    """A page of captions, the nearest first."""

    database: str = Field(description="`name@generation`.")
    model: str
    results: list[FoundCaptionBody]
    next_offset: int | None = Field(description="Pass as `offset` for the next page; null where there are no more.")
    searched: int = Field(description="The nearest captions that were looked through: 1,000, or as many as there are.")
    warnings: list[str] = Field([], description="Parts of the database that could not be searched.")

    @classmethod
    def of(cls, page: CaptionPage) -> "SearchResponse":
        """Return the page as it is told to callers."""
        return cls(
            database=own_name(page.database),
            warnings=list(page.warnings),
            model=page.model,
            results=[FoundCaptionBody(caption=caption, score=score) for caption, score in page.captions],
            next_offset=page.next_offset,
            searched=page.searched,
        )
