"""`deixis captions`, and names without labels on the command line, in process and over HTTP with a small encoder."""

import csv
import io
import json
import os
from contextlib import asynccontextmanager
from importlib import import_module

import httpx
import pytest
import structlog
from typer.testing import CliRunner

from app.captions.generations import CURRENT
from app.captions.manifest import MANIFEST
from app.captions.texts import TEXTS
from app.cli import cli
from app.cli.backends import OverHttp
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.settings import load_settings
from tests.captions_made import CAPTIONS, CaptionEncoder, made, place_of
from tests.cli.test_cli import assert_refused, assert_told_in_a_line, cells
from tests.conftest import picture

OWLS = ("a red owl", "two red owls in a tree", "a blue owl asleep", "a green door")


@pytest.fixture
def run(monkeypatch, tmp_path, lexicon_folder):
    """Run a command with its own data folder; returns typer's result."""
    monkeypatch.setattr("app.cli.common.load_encoders", lambda _: [CaptionEncoder()])
    monkeypatch.setattr("app.cli.common.configure_logs", lambda *_: None)
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DEIXIS_WORDNET_DIR", str(lexicon_folder))
    runner = CliRunner()

    def invoke(*arguments, stdin=None):
        # A command logs to standard error, and by default to standard output.
        with structlog.testing.capture_logs():
            return runner.invoke(cli, [str(argument) for argument in arguments], input=stdin)

    return invoke


@pytest.fixture(params=["in process", "over HTTP"])
def where(request, monkeypatch):
    """Return the flags of a command that works in process, or through a server with the same settings."""

    @asynccontextmanager
    async def over_asgi(_, **_who):
        app = create_app(load_settings(), lambda _: [CaptionEncoder()])
        # A server's log is no output of the command.
        with structlog.testing.capture_logs():
            lifespan = app.router.lifespan_context(app)
            await lifespan.__aenter__()
            try:
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                    yield OverHttp(client)
            finally:  # as a server ends, whatever its callers have met
                await lifespan.__aexit__(None, None, None)

    monkeypatch.setattr("app.cli.common.over_http", over_asgi)
    # A server that cannot answer now is asked again after so many seconds.
    monkeypatch.setattr(import_module("app.cli.backends.over_http"), "_retry_after_s", lambda _: 0)
    return ["--server", "http://test"] if request.param == "over HTTP" else []


@pytest.fixture
def databases(tmp_path):
    """The folder of databases."""
    return tmp_path / "data" / "captions"


@pytest.fixture
def owls(tmp_path):
    """A file of captions."""
    file = tmp_path / "owls.txt"
    file.write_text("\n".join(OWLS), "utf-8")
    return file


@pytest.fixture
def folder(tmp_path):
    """Three pictures of each of two colours."""
    for colour in ("red", "blue"):
        place = tmp_path / "pictures" / colour
        place.mkdir(parents=True)
        for number in range(3):
            (place / f"{number}.png").write_bytes(picture(colour, (8 + number, 8)))
    return tmp_path / "pictures"


def shown(run, name, *flags):
    """Return all that is known of a database."""
    done = run("captions", "show", name, "--json", *flags)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def captions_near(run, name, *arguments):
    """Return the captions that a search tells, the nearest first."""
    done = run("captions", "search", name, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return [each["caption"] for each in json.loads(done.stdout)["results"]]


def assert_fails_plainly(done):
    """Nothing that was asked of a command may end it with a stack trace."""
    assert done.exit_code in {1, 2}, done.output
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


# --- building ------------------------------------------------------------------------------------------------------


def test_a_database_is_built_of_a_file_and_told(run, owls):
    done = run("captions", "build", owls, "--name", "owls", "--licence", "CC0-1.0", "--notes", "seen at night")

    assert done.exit_code == 0, done.stderr
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (told["database"], told["captions"], told["model"]) == ("owls", "4", "fake")
    assert (told["licence"], told["source"]) == ("CC0-1.0", "seen at night")
    body = shown(run, "owls")
    assert (body["name"], body["captions"], body["source_notes"], body["licence"]) == (
        "owls",
        4,
        "seen at night",
        "CC0-1.0",
    )
    assert set(captions_near(run, "owls", "-t", "owl")) == set(OWLS)


def test_a_caption_that_files_have_in_common_is_kept_once_and_counted(run, owls, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps({"caption": each}) for each in (OWLS[0], "a red fox", "no")), "utf-8")

    done = run("captions", "build", owls, more, "-n", "both")

    assert done.exit_code == 0, done.stderr
    assert "1 duplicates, 1 too short" in done.stdout
    counts = shown(run, "both")["counts"]
    assert (counts["read"], counts["kept"], counts["duplicates"], counts["too_short"]) == (7, 5, 1, 1)


@pytest.mark.parametrize("column", ["what it says", "What It Says", "1", "-1"])
def test_the_column_of_a_table_is_told_by_its_name_or_its_place(run, tmp_path, column):
    file = tmp_path / "table.csv"
    with file.open("w", encoding="utf-8", newline="") as content:
        csv.writer(content).writerows([["title", "what it says"], *(["a title", each] for each in OWLS)])

    done = run("captions", "build", file, "-n", "table", "--column", column)

    assert done.exit_code == 0, done.stderr
    found = set(captions_near(run, "table", "-t", "owl"))
    assert set(OWLS) <= found
    assert found - set(OWLS) <= {"what it says"}  # told by its place, the first line may be a caption


def test_captions_come_from_standard_input(run):
    done = run("captions", "build", "-", "-n", "piped", stdin="\n".join(OWLS))

    assert done.exit_code == 0, done.stderr
    assert set(captions_near(run, "piped", "-t", "owl")) == set(OWLS)


def test_standard_input_may_come_beside_files(run, owls):
    done = run("captions", "build", owls, "-", "-n", "beside", stdin="a red fox\n")

    assert done.exit_code == 0, done.stderr
    assert set(captions_near(run, "beside", "-t", "owl")) == {*OWLS, "a red fox"}


def test_a_pipe_that_has_a_name_is_read_as_well_as_standard_input(run):
    """As shells make of `<(zcat captions.gz)`."""
    reading, writing = os.pipe()
    try:
        os.write(writing, "\n".join(OWLS).encode())
        os.close(writing)
        done = run("captions", "build", f"/dev/fd/{reading}", "-n", "piped")
    finally:
        os.close(reading)

    assert done.exit_code == 0, done.stderr
    assert set(captions_near(run, "piped", "-t", "owl")) == set(OWLS)


def test_rules_say_which_captions_are_kept(run, tmp_path):
    file = tmp_path / "mixed.txt"
    file.write_text(
        "an owl\nowl\n\u0441\u043e\u0432\u0430 \u043d\u043e\u0447\u044c\u044e\na very long owl indeed", "utf-8"
    )

    done = run("captions", "build", file, "-n", "kept", "--min-chars", 4, "--max-chars", 10, "--latin-only")

    assert done.exit_code == 0, done.stderr
    assert set(captions_near(run, "kept", "-t", "owl")) == {"an owl", "a very lon"}
    counts = shown(run, "kept")["counts"]
    assert (counts["too_short"], counts["other_script"], counts["cut"]) == (1, 1, 1)


def test_near_duplicates_are_left_out_when_asked(run, owls, monkeypatch):
    monkeypatch.setattr("app.cli.common.load_encoders", lambda _: [FakeEncoder()])

    done = run("captions", "build", owls, "-n", "few", "--near-duplicates", 0.97)

    assert done.exit_code == 0, done.stderr
    assert "1 near duplicates" in done.stdout
    assert shown(run, "few")["captions"] == 3


def test_the_nouns_of_the_lexicon_are_built_under_their_own_name_or_another(run):
    own, other = run("captions", "build", "--wordnet"), run("captions", "build", "--wordnet", "-n", "nouns")

    assert own.exit_code == other.exit_code == 0, own.stderr + other.stderr
    assert own.stdout.startswith("database    wordnet (default)\n")
    assert other.stdout.startswith("database    nouns\n")
    assert "WordNet 3.0 licence" in own.stdout
    assert shown(run, "wordnet")["captions"] == shown(run, "nouns")["captions"] == 4


def test_what_is_built_again_takes_the_place_of_what_was_there(run, owls):
    assert run("captions", "build", owls, "-n", "owls").exit_code == 0
    owls.write_text("a red fox", "utf-8")
    assert run("captions", "build", owls, "-n", "owls").exit_code == 0

    assert captions_near(run, "owls", "-t", "owl") == ["a red fox"]


def test_what_cannot_be_built_of_is_told_in_a_line_before_the_model_is_loaded(run, owls, monkeypatch):
    monkeypatch.setattr("app.cli.common.load_encoders", lambda _: pytest.fail("the model was loaded"))
    for arguments, told in [
        ([], "give files of captions, or --wordnet"),
        (["-n", "owls"], "give files of captions, or --wordnet"),
        ([owls, "--wordnet"], "give files of captions, or --wordnet"),
        ([owls], "say what to call the database"),
    ]:
        assert_told_in_a_line(run("captions", "build", *arguments), told)


@pytest.mark.parametrize("name", ["", " ", "Owls", "-owls", "a b", "../owls", "x" * 65, "\u00fc"])
def test_a_name_that_no_database_can_have_is_refused_and_nothing_is_built(run, owls, databases, name):
    done = run("captions", "build", owls, f"--name={name}")

    assert_refused(done, "is not a valid name of a caption database")
    assert not databases.exists() or list(databases.iterdir()) == []


def test_what_cannot_be_built_is_told_in_a_line_and_leaves_nothing(run, owls, databases, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n", "utf-8")
    (tmp_path / "short.txt").write_text("a\nb", "utf-8")
    (tmp_path / "table.csv").write_text("one,two\nx,y\n", "utf-8")
    (tmp_path / "wrong.json").write_text("{}", "utf-8")
    (tmp_path / "not.gz").write_bytes(b"nothing")
    for arguments, told in [
        ([tmp_path / "nowhere.txt"], "nowhere.txt' cannot be read"),
        ([tmp_path], "cannot be read"),
        ([tmp_path / "empty.txt"], "no captions are left; 0 were read"),
        ([tmp_path / "short.txt"], "no captions are left; 2 were read"),
        ([tmp_path / "table.csv", "--column", "three"], "has no column 'three'; name one of: 'one', 'two'"),
        ([tmp_path / "wrong.json"], "cannot be read as JSON"),
        ([tmp_path / "not.gz"], "cannot be read"),
        ([owls, "--min-chars", 9, "--max-chars", 8], "min_chars"),
        ([owls, "-m", "nope"], "unknown model 'nope'; known: fake"),
        ([owls, tmp_path / "nowhere.txt"], "nowhere.txt' cannot be read"),
    ]:
        assert_refused(run("captions", "build", *arguments, "-n", "owls"), told)
    assert_refused(run("captions", "build", "-", "-n", "owls", stdin=""), "no captions are left; 0 were read")
    assert run("captions", "show", "owls").exit_code == 2
    assert not (databases / "owls" / CURRENT).exists()


def test_a_build_that_fails_leaves_the_old_database_as_it_was(run, owls):
    assert run("captions", "build", owls, "-n", "owls").exit_code == 0
    before = shown(run, "owls")
    owls.write_text("a\n", "utf-8")

    assert_refused(run("captions", "build", owls, "-n", "owls"), "no captions are left")
    assert shown(run, "owls") == before


@pytest.mark.parametrize("option", ["--notes", "--licence"])
def test_notes_that_are_no_unicode_do_not_cost_the_build(run, owls, option):
    """A shell hands on whatever bytes a file name or another program has."""
    done = run("captions", "build", owls, "-n", "owls", option, "seen at \udcff")

    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    if done.exit_code == 0:
        assert shown(run, "owls")["captions"] == len(OWLS)
    else:
        assert_told_in_a_line(done, option)


def test_a_lexicon_that_is_not_there_is_told_with_the_way_out(run, monkeypatch, tmp_path):
    monkeypatch.setenv("DEIXIS_WORDNET_DIR", str(tmp_path / "nowhere"))
    assert_refused(run("captions", "build", "--wordnet"), "install Debian's package wordnet-base")


@pytest.mark.parametrize(
    "option",
    [
        ["--recall", "nan"],
        ["--recall", "0"],
        ["--recall", "1.5"],
        ["--near-duplicates", "nan"],
        ["--near-duplicates", "0.4"],
        ["--min-chars", "0"],
        ["--max-chars", "-1"],
        ["--max-chars", "many"],
        ["--column"],
    ],
    ids=" ".join,
)
def test_numbers_that_cannot_be_are_refused_by_the_command(run, owls, option):
    assert_fails_plainly(run("captions", "build", owls, "-n", "owls", *option))
    assert run("captions", "show", "owls").exit_code == 2


# --- what there is -------------------------------------------------------------------------------------------------


def test_databases_are_listed_by_name_with_the_default_marked(run, where, databases):
    made(databases / "things")
    made(databases / "a-few", CAPTIONS[:5])
    made(databases / "wordnet", CAPTIONS[:7])

    lines = cells(run("captions", "list", *where))

    assert lines[0] == ["database", "captions", "model", "MiB", "built"]
    assert [line[:-3] for line in lines[1:]] == [["a-few", "5"], ["things", "36"], ["wordnet", "(default)", "7"]]


def test_without_a_database_the_list_is_empty(run, where):
    assert cells(run("captions", "list", *where)) == [["database", "captions", "model", "MiB", "built"]]


def test_a_database_is_shown_as_json_alike_in_process_and_by_a_server(run, where, databases):
    manifest = made(databases / "things")

    told = shown(run, "things", *where)

    assert (told["name"], told["captions"], told["generation"]) == ("things", 36, manifest.generation)
    assert (told["default"], told["problem"], told["model"]) == (False, None, "fake")
    assert told["index"]["kind"] == "flat"
    assert told["bytes"] == sum(each["bytes"] for each in manifest.files.values())


def test_what_is_shown_names_what_was_left_out_and_where_it_is_from(run, where, databases):
    made(databases / "things", near_duplicates=0.5)

    done = run("captions", "show", "things", *where)

    lines = {line.partition("  ")[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert done.exit_code == 0, done.stderr
    assert lines["licence"] == "CC0-1.0"
    assert "near duplicates" in lines["left out"]
    assert done.stderr == ""


@pytest.mark.parametrize("damage", [MANIFEST, TEXTS, CURRENT])
def test_a_damaged_database_is_listed_and_shown_with_a_warning(run, where, databases, damage):
    made(databases / "things")
    file = databases / "things" / CURRENT if damage == CURRENT else place_of(databases / "things") / damage
    file.write_bytes(b"nonsense")

    for arguments in (["list"], ["show", "things"]):
        done = run("captions", *arguments, *where)
        assert done.exit_code == 0, done.stderr
        assert "things" in done.stdout
        assert done.stderr.startswith("warning: ")
        assert "build the database again" in done.stderr
    assert shown(run, "things", *where)["problem"]
    assert_refused(run("captions", "search", "things", "-t", "red", *where), "build the database again")


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"files": {TEXTS: {}}},
        {"files": []},
        {"counts": None},
        {"recall": None},
        {"captions": "many"},
        {"index": {"kind": "flat"}},
        {"index": {"kind": 7, "lists": 0, "probes": 0, "code_bytes": 0}},
    ],
    ids=json.dumps,
)
def test_a_manifest_of_other_types_hides_no_other_database(run, where, databases, change):
    made(databases / "things")
    made(databases / "others")
    file = place_of(databases / "things") / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change), "utf-8")

    done = run("captions", "list", *where)

    assert done.exit_code == 0, repr(done.exception)
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["others", "things"]


def test_a_database_of_another_model_can_be_seen_and_not_searched(run, where, databases):
    made(databases / "things", encoder=FakeEncoder("other"))

    assert shown(run, "things", *where)["model"] == "other"
    refused = run("captions", "search", "things", "-t", "red", *where)
    assert_refused(refused, "was built with 'other', which is not in service")
    assert_refused(run("captions", "search", "things", "-t", "red", "-m", "fake", *where), "another model, 'other'")


# --- searching -----------------------------------------------------------------------------------------------------


def test_captions_near_a_text_or_an_image_come_the_nearest_first(run, where, databases, folder):
    made(databases / "things")
    red = [caption for caption in CAPTIONS if "red" in caption]

    by_text = run("captions", "search", "things", "-t", "red", "-k", 5, "--json", *where)
    by_image = run("captions", "search", "things", "-i", folder / "red" / "0.png", "-k", 5, "--json", *where)
    table = run("captions", "search", "things", "-t", "red", "-k", 5, *where)

    for done in (by_text, by_image):
        assert done.exit_code == 0, done.stderr
        results = json.loads(done.stdout)["results"]
        assert len(results) == 5
        assert {each["caption"] for each in results} <= set(red)
        assert [each["score"] for each in results] == sorted((each["score"] for each in results), reverse=True)
    lines = table.stdout.splitlines()
    told = json.loads(by_text.stdout)["results"]
    assert lines[0].split() == ["score", "caption"]
    assert [line.split() for line in lines[1:]] == [[f"{each['score']:.4f}", *each["caption"].split()] for each in told]


def test_pages_follow_each_other_and_filters_leave_out_the_rest(run, where, databases):
    made(databases / "things")
    every = captions_near(run, "things", "-t", "red", "-k", 100, *where)

    assert sorted(every) == sorted(CAPTIONS)
    assert captions_near(run, "things", "-t", "red", "-k", 4, "--offset", 3, *where) == every[3:7]
    balls = [caption for caption in every if "ball" in caption]
    assert captions_near(run, "things", "-t", "red", "-k", 100, "--contains", "BALL", *where) == balls
    near = captions_near(run, "things", "-t", "red", "-k", 100, "--min-score", 0.5, *where)
    assert near == every[: len(near)]
    assert 0 < len(near) < len(every)
    assert captions_near(run, "things", "-t", "red", "--contains", "unicorn", *where) == []


def test_captions_are_printed_as_they_are_and_not_as_markup(run, where, databases):
    made(databases / "things", ["a [red] ball", "[bold]a red[/bold] car"])

    done = run("captions", "search", "things", "-t", "red", *where)

    assert done.exit_code == 0, done.stderr
    assert "a [red] ball" in done.stdout
    assert "[bold]a red[/bold] car" in done.stdout


def test_what_cannot_be_searched_for_is_told_in_a_line(run, where, databases, tmp_path):
    made(databases / "things")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    for arguments, told in [
        (["things"], "give either --text or --image"),
        (["things", "-t", "red", "-i", tmp_path / "bad.png"], "give either --text or --image"),
        (["things", "-i", tmp_path / "nowhere.png"], "nowhere.png: No such file or directory"),
        (["things", "-i", tmp_path], "Is a directory"),
        (["things", "-i", tmp_path / "bad.png"], "accepted formats: JPEG, PNG"),
        (["things", "-t", ""], "text"),
        (["things", "-t", "  "], "text"),
        (["things", "-t", "x" * 1001], "text"),
        (["things", "-t", "red", "-m", "nope"], "unknown model 'nope'; known: fake"),
        (["others", "-t", "red"], "unknown caption database 'others'; known: things"),
        (["Things!", "-t", "red"], "is not a valid name of a caption database"),
    ]:
        assert_refused(run("captions", "search", *arguments, *where), told)


@pytest.mark.parametrize(
    "option",
    [
        ["--contains", ""],
        ["--contains", "x" * 201],
        ["--min-score", "nan"],
        ["--min-score", "2"],
        ["-k", "0"],
        ["-k", "101"],
        ["--offset", "901"],
        ["--offset", "-1"],
        ["-k", "ten"],
    ],
    ids=lambda option: " ".join(option)[:20],
)
def test_limits_of_a_search_are_told_by_the_command(run, where, databases, option):
    made(databases / "things")
    assert_fails_plainly(run("captions", "search", "things", "-t", "red", *option, *where))


# --- deleting ------------------------------------------------------------------------------------------------------


def test_a_database_is_deleted_for_good(run, where, databases):
    made(databases / "things")
    made(databases / "others")

    done = run("captions", "delete", "things", *where)

    assert done.exit_code == 0, done.stderr
    assert done.stdout == "things deleted\n"
    assert [each.name for each in databases.iterdir()] == ["others"]
    told = "unknown caption database 'things'; known: others"
    for arguments in (["delete", "things"], ["show", "things"], ["search", "things", "-t", "red"]):
        assert_refused(run("captions", *arguments, *where), told)


@pytest.mark.parametrize("command", ["show", "delete"])
def test_a_database_that_is_not_there_or_cannot_be_is_told(run, where, databases, command):
    assert_refused(run("captions", command, "things", *where), "unknown caption database 'things'; known: none")
    for name in ("Things", "a b", "things@0123456789abcdef"):
        assert_refused(run("captions", command, name, *where), "is not a valid name of a caption database")


# --- names for images ----------------------------------------------------------------------------------------------


def test_without_labels_images_are_named_by_words_of_the_captions_near_them(run, where, databases, folder):
    made(databases / "things")

    done = run("classify", folder, "-f", "json", "-k", 3, *where)

    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert [each["path"].split("/")[-2] for each in told] == ["blue"] * 3 + ["red"] * 3
    for each in told:
        assert len(each["predictions"]) == 3
        assert each["predictions"][0]["label"] == each["path"].split("/")[-2]
        assert "explanation" not in each


def test_a_table_and_csv_tell_the_same_names(run, where, databases, folder):
    made(databases / "things")

    table, lines = run("classify", folder, *where), run("classify", folder, "-f", "csv", *where)

    rows = list(csv.DictReader(io.StringIO(lines.stdout)))
    assert [row["label"] for row in rows] == ["blue"] * 3 + ["red"] * 3
    assert [line[1:] for line in cells(table)[1:]] == [
        [row["rank"], row["label"], row["score"], row["similarity"]] for row in rows
    ]


def test_a_database_is_asked_by_its_name(run, where, databases, folder):
    made(databases / "things")
    made(databases / "owls", ["a red owl", "two red owls", "red owls at night"])

    done = run("classify", folder / "red", "-d", "owls", "-f", "json", "-k", 9, *where)
    several = run("classify", folder / "red", *where)
    none = run("classify", folder / "red", "-d", "foxes", *where)

    assert done.exit_code == 0, done.stderr
    labels = {prediction["label"] for each in json.loads(done.stdout) for prediction in each["predictions"]}
    assert labels == {"owl", "red"}
    assert_refused(several, "the model 'fake' has owls, things")
    assert_refused(none, "unknown caption database 'foxes'; known: owls, things")


def test_explanations_show_captions_and_what_each_suggested(run, where, databases, folder):
    made(databases / "things")
    asked = ("classify", folder / "red" / "0.png", "--explain", "-k", 2)

    table, told = run(*asked, *where), run(*asked, "-f", "json", *where)

    assert table.exit_code == told.exit_code == 0, table.stderr + told.stderr
    (result,) = json.loads(told.stdout)
    captions = result["explanation"]["captions"]
    assert captions
    best = result["predictions"][0]["label"]
    for each in captions:
        assert (best in each["suggested"]) == (best in each["caption"].split())
        suffix = f"   suggested {', '.join(each['suggested'])}" if each["suggested"] else ""
        assert f"{each['similarity']:6.3f}  {each['caption']}{suffix}" in table.stdout


def test_together_images_get_few_names_which_are_counted(run, where, databases, folder):
    made(databases / "things")

    table = run("classify", folder, "--group", "-o", "min_images=2", *where)
    told = run("classify", folder, "--group", "-o", "min_images=2", "-f", "json", *where)

    assert table.exit_code == told.exit_code == 0, table.stderr + told.stderr
    names = [each["predictions"][0]["label"] for each in json.loads(told.stdout)]
    assert len(names) == 6
    counted = {name: names.count(name) for name in names}
    assert min(counted.values()) >= 2
    lines = table.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.split() == ["name", "images"]]
    rows = [line.rsplit(maxsplit=1) for line in lines[at + 1 :]]
    assert {name.strip(): int(images) for name, images in rows} == counted
    assert [int(images) for _, images in rows] == sorted((int(images) for _, images in rows), reverse=True)


def test_together_more_images_are_named_in_process_than_a_request_may_bring(run, databases, folder, monkeypatch):
    made(databases / "things")
    monkeypatch.setenv("DEIXIS_MAX_IMAGES_PER_REQUEST", "4")
    monkeypatch.setenv("DEIXIS_MAX_QUEUED_IMAGES", "4")
    monkeypatch.setenv("DEIXIS_REQUEST_TIMEOUT_S", "0.001")
    for number in range(80):
        (folder / "red" / f"more {number}.png").write_bytes(picture("red", (9, 9 + number)))

    done = run("classify", folder, "--group", "-f", "json")

    assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)) == 86


def test_together_more_images_than_a_server_takes_are_told_with_the_setting(run, databases, folder, monkeypatch, where):
    made(databases / "things")
    monkeypatch.setenv("DEIXIS_MAX_IMAGES_PER_REQUEST", "4")

    done = run("classify", folder, "--group", *where)

    if where:
        assert_refused(done, "DEIXIS_MAX_IMAGES_PER_REQUEST")
    else:
        assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("group", [[], ["--group"]], ids=["alone", "together"])
def test_bad_files_are_named_and_the_exit_status_tells_some_or_all(run, where, databases, folder, tmp_path, group):
    made(databases / "things")
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")

    some = run("classify", folder, bad, *group, "-f", "json", *where)
    every = run("classify", bad, *group, *where)

    assert some.exit_code == 1, some.stderr
    assert len(json.loads(some.stdout)) == 7
    assert f"skipped {bad}" in some.stderr
    assert every.exit_code == 2
    assert "bad.jpg" in every.stderr


def test_an_image_below_the_threshold_is_none_of_the_names(run, where, databases, folder):
    made(databases / "things")
    for group in ([], ["--group"]):
        done = run("classify", folder, "--reject-below", 1, "-f", "json", *group, *where)
        assert done.exit_code == 0, done.stderr
        assert [each["rejected"] for each in json.loads(done.stdout)] == [True] * 6


def test_questions_without_labels_that_cannot_be_are_told_in_a_line(run, where, databases, folder):
    made(databases / "things")
    assert_refused(run("classify", folder, "--method", "zero-shot", *where), "give labels")
    assert_refused(run("classify", folder, "--method", "auto", *where), "give labels")
    for arguments, told in [
        (["-l", "red", "--group"], "group"),
        (["-l", "red", "-d", "things"], "database"),
        (["-l", "red", "--method", "cased"], "cased"),
        (["--method", "csed"], "unknown method 'csed'"),
        (["-m", "nope"], "unknown model 'nope'; known: fake"),
        (["-t", "nope"], "unknown template set 'nope'"),
        (["-d", "Things!"], "is not a valid name of a caption database"),
        (["-d", ""], "is not a valid name of a caption database"),
        (["--coverage", "0.9"], "coverage"),
        (["--false-rejection-rate", "0.1"], "false_rejection_rate"),
        (["-o", "alpha=2"], "alpha"),
        (["-o", "alpha=nan"], "alpha"),
        (["-o", "captions=0"], "captions"),
        (["-o", "captions=2.5"], "captions"),
        (["-o", "beta=1"], "beta"),
        (["-o", "min_images=-1"], "min_images"),
        (["-o", "alpha"], "NAME=NUMBER"),
    ]:
        for group in ([], ["--group"]):
            assert_refused(run("classify", folder, *arguments, *group, *where), told)


def test_without_a_database_a_command_says_how_to_build_one(run, where, folder):
    assert_refused(run("classify", folder, *where), "deixis captions build")


# --- the database that comes with it -------------------------------------------------------------------------------


@pytest.fixture
def building(monkeypatch):
    monkeypatch.setenv("DEIXIS_BUILD_WORDNET", "true")


@pytest.mark.usefixtures("building")
def test_the_first_command_builds_the_words_that_names_are_found_in_and_the_next_does_not(run, folder, monkeypatch):
    first = run("classify", folder, "-f", "json")
    before = shown(run, "wordnet")
    encoder = CaptionEncoder()
    monkeypatch.setattr("app.cli.common.load_encoders", lambda _: [encoder])
    second = run("classify", folder, "-f", "json")

    assert first.exit_code == second.exit_code == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout
    assert shown(run, "wordnet") == before
    assert "golden retriever" not in encoder.encoded_texts


@pytest.mark.usefixtures("building")
def test_a_command_with_labels_or_with_another_database_builds_nothing(run, databases, folder):
    made(databases / "things")
    for arguments in (["-l", "red, blue"], ["-d", "things"]):
        done = run("classify", folder, *arguments)
        assert done.exit_code == 0, done.stderr
    assert [each.name for each in databases.iterdir()] == ["things"]


@pytest.mark.usefixtures("building")
@pytest.mark.parametrize(
    "wrong",
    [
        ["--method", "zero-shot"],
        ["--method", "csed"],
        ["-m", "nope"],
        ["-t", "nope"],
        ["--coverage", "0.9"],
        ["-o", "alpha=2"],
    ],
    ids=" ".join,
)
def test_a_question_that_cannot_be_is_told_before_anything_is_built_for_it(run, databases, folder, wrong):
    """With a real model the build takes minutes."""
    assert run("classify", folder, *wrong).exit_code == 2
    assert not databases.exists() or list(databases.iterdir()) == []


# --- how good the names are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [[], ["--group"]], ids=["alone", "together"])
def test_names_are_compared_with_the_classes(run, databases, folder, tmp_path, group):
    made(databases / "things")
    file = tmp_path / "report.json"

    done = run("evaluate", folder, "--method", "cased", *group, "--json", file)
    told = run("evaluate", folder, "--method", "cased", *group, "--json", "-")

    assert done.exit_code == told.exit_code == 0, done.stderr + told.stderr
    report = json.loads(file.read_text("utf-8"))
    assert report | {"images_per_s": 0} == json.loads(told.stdout) | {"images_per_s": 0}
    assert (report["images"], report["skipped"]) == (6, 0)
    assert {name: sum(found.values()) for name, found in report["classes"].items()} == {"blue": 3, "red": 3}
    every = {name for found in report["classes"].values() for name in found}
    assert report["names"] == len(every)
    for figure in ("cluster_accuracy", "semantic_iou", "semantic_similarity"):
        assert -1 <= report[figure] <= 1
    if not group:
        assert (report["cluster_accuracy"], report["semantic_iou"], report["semantic_similarity"]) == (1, 1, 1)
        assert report["classes"] == {"blue": {"blue": 3}, "red": {"red": 3}}
    assert "cluster accuracy" in done.stdout
    assert "found most often" in done.stdout


def test_the_names_of_subfolders_may_be_others(run, databases, folder):
    made(databases / "things")

    done = run("evaluate", folder, "--method", "cased", "-n", "red=scarlet thing", "--json", "-")

    assert done.exit_code == 0, done.stderr
    assert set(json.loads(done.stdout)["classes"]) == {"blue", "scarlet thing"}


@pytest.mark.parametrize("group", [[], ["--group"]], ids=["alone", "together"])
def test_bad_images_of_a_folder_are_named_and_the_rest_is_measured(run, databases, folder, tmp_path, group):
    made(databases / "things")
    (folder / "red" / "bad.png").write_bytes(b"nothing")

    some = run("evaluate", folder, "--method", "cased", *group, "--json", "-")

    assert some.exit_code == 1
    report = json.loads(some.stdout)
    assert (report["images"], report["skipped"]) == (6, 1)
    assert "bad.png" in some.stderr

    place = tmp_path / "all bad" / "red"
    place.mkdir(parents=True)
    (place / "bad.png").write_bytes(b"nothing")
    every = run("evaluate", tmp_path / "all bad", "--method", "cased", *group)
    assert_refused(every, "not one of its images could be read")


def test_evaluations_of_names_that_cannot_be_are_told_in_a_line(run, databases, folder, tmp_path):
    made(databases / "things")
    (tmp_path / "empty").mkdir()
    cased = ("--method", "cased")
    for arguments, told in [
        ([folder, *cased, "-l", "red"], "cased gets no classes and no server"),
        ([folder, *cased, "-s", "things"], "cased gets no classes and no server"),
        ([folder, *cased, "--server", "http://127.0.0.1:9"], "cased gets no classes and no server"),
        ([folder, "--group"], "goes with --method cased"),
        ([folder, "-d", "things"], "goes with --method cased"),
        ([folder, "--method", "gda", "--group"], "goes with --method cased"),
        ([folder, "--method", "all", "-d", "things"], "goes with --method cased"),
        ([folder, *cased, "--support", folder], "goes with --method all"),
        ([folder, *cased, "--picture", tmp_path / "a.svg"], "--picture"),
        ([folder, *cased, "--json", tmp_path / "nowhere" / "a.json"], "there is no folder"),
        ([folder, *cased, "-n", "green=x"], "unknown subfolder 'green'"),
        ([folder, *cased, "-d", "others"], "unknown caption database 'others'; known: things"),
        ([folder, *cased, "-o", "alpha=7"], "alpha"),
        ([folder, *cased, "-m", "nope"], "unknown model 'nope'"),
        ([folder, *cased, "-t", "nope"], "unknown template set 'nope'"),
        ([tmp_path / "empty", *cased], "has no subfolder with images"),
        ([tmp_path / "nowhere", *cased], "is not a folder"),
    ]:
        assert_refused(run("evaluate", *arguments), told)
