"""Caption databases and searches in them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import Field

from app.api.schemas._base import ModelName, Request, Response
from app.api.schemas.images import ImageBody
from app.captions.build_plan import BuildPlan
from app.captions.catalogue import DatabaseState
from app.captions.query import MAX_CONTAINS_CHARS, MAX_LIMIT, MAX_OFFSET
from app.captions.search import CaptionPage
from app.errors import InvalidFieldError
from app.names.class_names import MAX_ITEMS
from app.names.namespaces import namespace_of, own_name


class BuildDatabaseBody(Request):
    """A request to build a caption database from exactly one of source, files and captions."""

    source: Literal["everyday", "wordnet"] | None = Field(
        None, description="The names that come with Deixis, or the nouns of WordNet."
    )
    files: list[Annotated[str, Field(min_length=1, max_length=4096)]] | None = Field(
        None,
        min_length=1,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="Paths relative to `DEIXIS_IMPORT_DIR`: text, CSV, TSV, JSON, JSON lines or Parquet, also `.gz`,"
        " `.zst`.",
        examples=[["products.csv.gz"]],
    )
    captions: list[str] | None = Field(
        None, min_length=1, max_length=MAX_ITEMS, fail_fast=True, description="The captions themselves."
    )
    model: ModelName | None = Field(
        None, description="The model that encodes the captions; by default the first of `GET /v1/models`."
    )
    column: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="The column of a CSV, TSV, JSON or Parquet file; by default recognised by its name.",
    )
    min_chars: int = Field(3, ge=1, le=10_000, description="Leave out shorter captions.")
    max_chars: int = Field(500, ge=1, le=10_000, description="Cut longer captions.")
    latin_only: bool = Field(default=False, description="Leave out captions with less than 80 % Latin letters.")
    near_duplicates: float | None = Field(
        None,
        ge=0.5,
        le=1,
        description="Leave out captions with a cosine similarity above this to a caption shortly before, for example"
        " 0.97.",
    )
    recall: float = Field(
        0.95, gt=0, le=1, description="The share of the nearest captions that a search of a large database should find."
    )
    source_notes: str = Field("", max_length=2000, description="The origin of the captions.")
    licence: str = Field("", max_length=2000, description="The licence of the captions.")

    def plan(self, default_model: str) -> BuildPlan:
        """Return the build plan.

        Raises:
            InvalidFieldError: not exactly one of source, files and captions is given.
        """
        if [self.source, self.files, self.captions].count(None) != 2:
            raise InvalidFieldError.of("source", "give exactly one of source, files and captions")
        return BuildPlan(
            model=self.model or default_model,
            files=tuple(self.files or ()),
            captions=tuple(self.captions or ()),
            **self.model_dump(exclude={"model", "files", "captions"}),
        )


class IndexBody(Response):
    """The search index of a caption database."""

    kind: str = Field(
        description="`flat`: compares with every caption; `ivf-pq`: compares with the codes of the captions in some"
        " lists."
    )
    lists: int
    probes: int = Field(description="Number of lists that a search reads.")
    code_bytes: int


class DatabaseBody(Response):
    """A caption database. Fields that cannot be read from a damaged one are null."""

    name: str
    default: bool = Field(description="True if it is used by requests that name no database.")
    model: str | None = Field(description="The model that encoded the captions.")
    models: list[str] = Field(description="Models in service that can search it.")
    captions: int | None
    dims: int | None
    index: IndexBody | None
    recall: dict[str, float] | None = Field(
        description="Measured share of the nearest captions that a search finds, per kind of query: `near` and `far`"
        " captions, or `images`."
    )
    recall_at: int | None
    recall_target: float | None
    counts: dict[str, int] | None = Field(
        description="Number of captions read, kept and left out, by reason; `to_come` while the build goes on."
    )
    source_notes: str | None
    licence: str | None
    bytes: int
    generation: str | None
    created_at: str | None
    problem: str | None = Field(description="Why it cannot be searched; null if it can.")

    @classmethod
    def of(cls, state: DatabaseState, models: Sequence[str], *, default: bool) -> "DatabaseBody":
        """Convert a database's state; other namespaces are removed from its problem."""
        manifest, problem = state.manifest, state.problem_with(models)
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
    """All caption databases, sorted by name."""

    databases: list[DatabaseBody]


class SearchFields(Request):
    """Everything in a caption search except the image; the same fields in a form, in JSON and in a query string."""

    text: str | None = Field(None, description="Find captions similar to this text.", examples=["a dog on a beach"])
    model: ModelName | None = Field(None, description="One of the `models` of the database; by default the first.")
    limit: int = Field(10, ge=1, le=MAX_LIMIT, description="Number of captions per page.")
    offset: int = Field(0, ge=0, le=MAX_OFFSET, description="`next_offset` of the previous page.")
    contains: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CONTAINS_CHARS,
        description="Only captions that contain this text, ignoring case, among the 1,000 nearest.",
    )
    min_score: float | None = Field(
        None, ge=-1, le=1, description="Only captions with at least this cosine similarity, among the 1,000 nearest."
    )


class SearchBody(SearchFields):
    """A caption search, as JSON."""

    image: ImageBody | None = Field(None, description="Find captions similar to this image, instead of `text`.")


class FoundCaptionBody(Response):
    """A caption with its score."""

    caption: str
    score: float = Field(description="Cosine similarity with the query, in [-1, 1].")


class SearchResponse(Response):
    """A page of captions, nearest first."""

    database: str = Field(description="`name@generation`.")
    model: str
    results: list[FoundCaptionBody]
    next_offset: int | None = Field(description="Pass as `offset` to get the next page; null on the last page.")
    searched: int = Field(
        description="Number of nearest captions that were examined: 1,000, or all of a smaller database."
    )
    warnings: list[str] = Field([], description="Captions that could not be searched, and why.")

    @classmethod
    def of(cls, page: CaptionPage) -> "SearchResponse":
        """Convert a page of captions."""
        return cls(
            database=own_name(page.database),
            warnings=list(page.warnings),
            model=page.model,
            results=[FoundCaptionBody(caption=caption, score=score) for caption, score in page.captions],
            next_offset=page.next_offset,
            searched=page.searched,
        )
