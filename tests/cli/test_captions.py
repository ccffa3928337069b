"""`deixis captions`, and names without labels on the command line, in process and over HTTP with a small encoder."""

import csv
import io
import json
import os

import pytest

from app.captions.generations import CURRENT
from app.captions.manifest import MANIFEST
from app.captions.texts import TEXTS
from app.encoders.fake import FakeEncoder
from tests.captions_made import CAPTIONS, CaptionEncoder, made, place_of
from tests.cli.output import assert_refused, cells
from tests.conftest import picture

OWLS = ("a red owl", "two red owls in a tree", "a blue owl asleep", "a green door")


@pytest.fixture
def new_encoder(monkeypatch, lexicon_folder):
    """An encoder for which captions and pictures of their colours are near, and a small WordNet."""
    monkeypatch.setenv("DEIXIS_WORDNET_DIR", str(lexicon_folder))
    return CaptionEncoder


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


def test_a_database_is_built_from_a_file_and_shown(run, owls):
    done = run("captions", "build", owls, "--name", "owls", "--licence", "CC0-1.0", "--notes", "seen at night")

    assert done.exit_code == 0, done.stderr
    fields = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (fields["database"], fields["captions"], fields["model"]) == ("owls", "4", "fake")
    assert (fields["licence"], fields["source"]) == ("CC0-1.0", "seen at night")
    body = shown(run, "owls")
    assert (body["name"], body["captions"], body["source_notes"], body["licence"]) == (
        "owls",
        4,
        "seen at night",
        "CC0-1.0",
    )
    assert set(captions_near(run, "owls", "-t", "owl")) == set(OWLS)


def test_a_caption_in_several_files_is_stored_once_and_counted(run, owls, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps({"caption": each}) for each in (OWLS[0], "a red fox", "no")), "utf-8")

    done = run("captions", "build", owls, more, "-n", "both")

    assert done.exit_code == 0, done.stderr
    assert "1 duplicates, 1 too short" in done.stdout
    counts = shown(run, "both")["counts"]
    assert (counts["read"], counts["kept"], counts["duplicates"], counts["too_short"]) == (7, 5, 1, 1)


@pytest.mark.parametrize("column", ["what it says", "What It Says", "1", "-1"])
def test_the_column_of_a_table_is_selected_by_name_or_index(run, tmp_path, column):
    file = tmp_path / "table.csv"
    with file.open("w", encoding="utf-8", newline="") as content:
        csv.writer(content).writerows([["title", "what it says"], *(["a title", each] for each in OWLS)])

    done = run("captions", "build", file, "-n", "table", "--column", column)

    assert done.exit_code == 0, done.stderr
    found = set(captions_near(run, "table", "-t", "owl"))
    assert set(OWLS) <= found
    assert found - set(OWLS) <= {"what it says"}  # selected by index, the first line may be a caption


def test_captions_come_from_standard_input(run):
    done = run("captions", "build", "-", "-n", "piped", stdin="\n".join(OWLS))

    assert done.exit_code == 0, done.stderr
    assert set(captions_near(run, "piped", "-t", "owl")) == set(OWLS)


def test_standard_input_can_be_combined_with_files(run, owls):
    done = run("captions", "build", owls, "-", "-n", "beside", stdin="a red fox\n")

    assert done.exit_code == 0, done.stderr
    assert set(captions_near(run, "beside", "-t", "owl")) == {*OWLS, "a red fox"}


def test_a_named_pipe_is_read_like_standard_input(run):
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


def test_options_select_the_captions_that_are_stored(run, tmp_path):
    file = tmp_path / "mixed.txt"
    file.write_text(
        "an owl\nowl\n\u0441\u043e\u0432\u0430 \u043d\u043e\u0447\u044c\u044e\na very long owl indeed", "utf-8"
    )

    done = run("captions", "build", file, "-n", "kept", "--min-chars", 4, "--max-chars", 10, "--latin-only")

    assert done.exit_code == 0, done.stderr
    assert set(captions_near(run, "kept", "-t", "owl")) == {"an owl", "a very lon"}
    counts = shown(run, "kept")["counts"]
    assert (counts["too_short"], counts["other_script"], counts["cut"]) == (1, 1, 1)


def test_near_duplicates_are_left_out_on_request(run, owls, monkeypatch):
    monkeypatch.setattr("app.cli.backends.in_process.load_encoders", lambda _: [FakeEncoder()])

    done = run("captions", "build", owls, "-n", "few", "--near-duplicates", 0.97)

    assert done.exit_code == 0, done.stderr
    assert "1 near duplicates" in done.stdout
    assert shown(run, "few")["captions"] == 3


def test_the_wordnet_database_has_a_default_name(run):
    own, other = run("captions", "build", "--wordnet"), run("captions", "build", "--wordnet", "-n", "nouns")

    assert own.exit_code == other.exit_code == 0, own.stderr + other.stderr
    assert own.stdout.startswith("database    wordnet\n")
    assert other.stdout.startswith("database    nouns\n")
    assert "WordNet 3.0 licence" in own.stdout
    assert shown(run, "wordnet")["captions"] == shown(run, "nouns")["captions"] == 4


def test_a_rebuild_replaces_the_database(run, owls):
    assert run("captions", "build", owls, "-n", "owls").exit_code == 0
    owls.write_text("a red fox", "utf-8")
    assert run("captions", "build", owls, "-n", "owls").exit_code == 0

    assert captions_near(run, "owls", "-t", "owl") == ["a red fox"]


def test_invalid_sources_are_errors_before_the_model_is_loaded(run, owls, monkeypatch):
    monkeypatch.setattr("app.cli.backends.in_process.load_encoders", lambda _: pytest.fail("the model was loaded"))
    for arguments, message in [
        ([], "pass files of captions or --everyday"),
        (["-n", "owls"], "pass files of captions or --everyday"),
        (["--everyday", "--wordnet"], "and one of them"),
        ([owls, "--wordnet"], "pass files of captions or --everyday"),
        ([owls], "the database needs a name"),
    ]:
        assert_refused(run("captions", "build", *arguments), message)


@pytest.mark.parametrize("name", ["", " ", "Owls", "-owls", "a b", "../owls", "x" * 65, "\u00fc"])
def test_an_invalid_name_is_an_error_and_nothing_is_built(run, owls, databases, name):
    done = run("captions", "build", owls, f"--name={name}")

    assert_refused(done, "is not a valid name of a caption database")
    assert not databases.exists() or list(databases.iterdir()) == []


def test_invalid_options_of_a_build_are_errors_of_one_line_and_leave_nothing(run, owls, databases, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n", "utf-8")
    (tmp_path / "short.txt").write_text("a\nb", "utf-8")
    (tmp_path / "table.csv").write_text("one,two\nx,y\n", "utf-8")
    (tmp_path / "wrong.json").write_text("{}", "utf-8")
    (tmp_path / "not.gz").write_bytes(b"nothing")
    for arguments, message in [
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
        assert_refused(run("captions", "build", *arguments, "-n", "owls"), message)
    assert_refused(run("captions", "build", "-", "-n", "owls", stdin=""), "no captions are left; 0 were read")
    assert run("captions", "show", "owls").exit_code == 2
    assert not (databases / "owls" / CURRENT).exists()


def test_a_failed_build_does_not_change_the_old_database(run, owls):
    assert run("captions", "build", owls, "-n", "owls").exit_code == 0
    before = shown(run, "owls")
    owls.write_text("a\n", "utf-8")

    assert_refused(run("captions", "build", owls, "-n", "owls"), "no captions are left")
    assert shown(run, "owls") == before


@pytest.mark.parametrize("option", ["--notes", "--licence"])
def test_notes_that_are_not_unicode_do_not_fail_the_build(run, owls, option):
    """A shell hands on whatever bytes a file name or another program has."""
    done = run("captions", "build", owls, "-n", "owls", option, "seen at \udcff")

    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    if done.exit_code == 0:
        assert shown(run, "owls")["captions"] == len(OWLS)
    else:
        assert_refused(done, option)


def test_a_missing_lexicon_is_an_error_that_names_the_setting(run, monkeypatch, tmp_path):
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
def test_numbers_out_of_range_are_refused(run, owls, option):
    assert_fails_plainly(run("captions", "build", owls, "-n", "owls", *option))
    assert run("captions", "show", "owls").exit_code == 2


# --- what there is -------------------------------------------------------------------------------------------------


def test_databases_are_listed_by_name_with_the_default_marked(run, where, databases):
    made(databases / "things")
    made(databases / "a-few", CAPTIONS[:5])
    made(databases / "everyday", CAPTIONS[:7])

    lines = cells(run("captions", "list", *where))

    assert lines[0] == ["database", "captions", "model", "MiB", "built"]
    assert [line[:-3] for line in lines[1:]] == [["a-few", "5"], ["everyday", "(default)", "7"], ["things", "36"]]


def test_without_databases_the_list_is_empty(run, where):
    assert cells(run("captions", "list", *where)) == [["database", "captions", "model", "MiB", "built"]]


def test_a_database_is_shown_as_json(run, where, databases):
    manifest = made(databases / "things")

    fields = shown(run, "things", *where)

    assert (fields["name"], fields["captions"], fields["generation"]) == ("things", 36, manifest.generation)
    assert (fields["default"], fields["problem"], fields["model"]) == (False, None, "fake")
    assert fields["index"]["kind"] == "flat"
    assert fields["bytes"] == sum(each["bytes"] for each in manifest.files.values())


def test_a_database_is_shown_with_the_left_out_captions_and_the_source(run, where, databases):
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
def test_a_manifest_with_wrong_types_does_not_hide_other_databases(run, where, databases, change):
    made(databases / "things")
    made(databases / "others")
    file = place_of(databases / "things") / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change), "utf-8")

    done = run("captions", "list", *where)

    assert done.exit_code == 0, repr(done.exception)
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["others", "things"]


def test_a_database_of_another_model_is_listed_and_cannot_be_searched(run, where, databases):
    made(databases / "things", encoder=FakeEncoder("other"))

    assert shown(run, "things", *where)["model"] == "other"
    refused = run("captions", "search", "things", "-t", "red", *where)
    assert_refused(refused, "was built with 'other', which is not in service")
    assert_refused(run("captions", "search", "things", "-t", "red", "-m", "fake", *where), "another model, 'other'")


# --- searching -----------------------------------------------------------------------------------------------------


def test_a_search_by_text_or_image_returns_the_nearest_captions_first(run, where, databases, folder):
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
    results = json.loads(by_text.stdout)["results"]
    assert lines[0].split() == ["score", "caption"]
    assert [line.split() for line in lines[1:]] == [
        [f"{each['score']:.4f}", *each["caption"].split()] for each in results
    ]


def test_a_search_has_pages_and_filters(run, where, databases):
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


def test_captions_are_not_printed_as_markup(run, where, databases):
    made(databases / "things", ["a [red] ball", "[bold]a red[/bold] car"])

    done = run("captions", "search", "things", "-t", "red", *where)

    assert done.exit_code == 0, done.stderr
    assert "a [red] ball" in done.stdout
    assert "[bold]a red[/bold] car" in done.stdout


def test_invalid_searches_are_errors_of_one_line(run, where, databases, tmp_path):
    made(databases / "things")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    for arguments, message in [
        (["things"], "pass either --text or --image"),
        (["things", "-t", "red", "-i", tmp_path / "bad.png"], "pass either --text or --image"),
        (["things", "-i", tmp_path / "nowhere.png"], "nowhere.png: No such file or directory"),
        (["things", "-i", tmp_path], "not a regular file, but a folder"),
        (["things", "-i", tmp_path / "bad.png"], "accepted formats: JPEG, PNG"),
        (["things", "-t", ""], "text"),
        (["things", "-t", "  "], "text"),
        (["things", "-t", "x" * 1001], "text"),
        (["things", "-t", "red", "-m", "nope"], "unknown model 'nope'; known: fake"),
        (["others", "-t", "red"], "unknown caption database 'others'; known: things"),
        (["Things!", "-t", "red"], "is not a valid name of a caption database"),
    ]:
        assert_refused(run("captions", "search", *arguments, *where), message)


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
def test_the_options_of_a_search_have_limits(run, where, databases, option):
    made(databases / "things")
    assert_fails_plainly(run("captions", "search", "things", "-t", "red", *option, *where))


# --- deleting ------------------------------------------------------------------------------------------------------


def test_a_database_is_deleted_permanently(run, where, databases):
    made(databases / "things")
    made(databases / "others")

    done = run("captions", "delete", "things", *where)

    assert done.exit_code == 0, done.stderr
    assert done.stdout == "things deleted\n"
    assert [each.name for each in databases.iterdir()] == ["others"]
    message = "unknown caption database 'things'; known: others"
    for arguments in (["delete", "things"], ["show", "things"], ["search", "things", "-t", "red"]):
        assert_refused(run("captions", *arguments, *where), message)


@pytest.mark.parametrize("command", ["show", "delete"])
def test_an_unknown_or_invalid_database_is_an_error(run, where, databases, command):
    assert_refused(run("captions", command, "things", *where), "unknown caption database 'things'; known: none")
    for name in ("Things", "a b", "things@0123456789abcdef"):
        assert_refused(run("captions", command, name, *where), "is not a valid name of a caption database")


# --- names for images ----------------------------------------------------------------------------------------------


def test_without_labels_the_labels_are_discovered_in_nearby_captions(run, where, databases, folder):
    made(databases / "things")

    done = run("classify", folder, "-f", "json", "-k", 3, *where)

    assert done.exit_code == 0, done.stderr
    results = json.loads(done.stdout)
    assert [each["path"].split("/")[-2] for each in results] == ["blue"] * 3 + ["red"] * 3
    for each in results:
        assert len(each["predictions"]) == 3
        assert each["predictions"][0]["label"] == each["path"].split("/")[-2]
        assert "explanation" not in each


def test_a_table_and_csv_have_the_same_labels(run, where, databases, folder):
    made(databases / "things")

    table, lines = run("classify", folder, "-k", 1, *where), run("classify", folder, "-f", "csv", *where)

    rows = list(csv.DictReader(io.StringIO(lines.stdout)))
    assert [row["label"] for row in rows] == ["blue"] * 3 + ["red"] * 3
    assert [line[1:] for line in cells(table)[1:]] == [[row["label"], row["score"]] for row in rows]


def test_a_database_is_selected_by_name(run, where, databases, folder):
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


def test_explanations_show_captions_and_the_labels_that_they_suggested(run, where, databases, folder):
    made(databases / "things")
    asked = ("classify", folder / "red" / "0.png", "--explain", "-k", 2)

    table, as_json = run(*asked, *where), run(*asked, "-f", "json", *where)

    assert table.exit_code == as_json.exit_code == 0, table.stderr + as_json.stderr
    (result,) = json.loads(as_json.stdout)
    captions = result["explanation"]["captions"]
    assert captions
    best = result["predictions"][0]["label"]
    for each in captions:
        assert (best in each["suggested"]) == (best in each["caption"].split())
        suffix = f"   suggested {', '.join(each['suggested'])}" if each["suggested"] else ""
        assert f"{each['similarity']:6.3f}  {each['caption']}{suffix}" in table.stdout


def test_a_group_of_images_shares_few_labels_which_are_counted(run, where, databases, folder):
    made(databases / "things")

    table = run("classify", folder, "--group", "-o", "min_images=2", *where)
    as_json = run("classify", folder, "--group", "-o", "min_images=2", "-f", "json", *where)

    assert table.exit_code == as_json.exit_code == 0, table.stderr + as_json.stderr
    names = [each["predictions"][0]["label"] for each in json.loads(as_json.stdout)]
    assert len(names) == 6
    counted = {name: names.count(name) for name in names}
    assert min(counted.values()) >= 2
    lines = table.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.split() == ["name", "images"]]
    rows = [line.rsplit(maxsplit=1) for line in lines[at + 1 :]]
    assert {name.strip(): int(images) for name, images in rows} == counted
    assert [int(images) for _, images in rows] == sorted((int(images) for _, images in rows), reverse=True)


def test_a_group_in_process_may_exceed_the_images_of_a_request(run, databases, folder, monkeypatch):
    made(databases / "things")
    monkeypatch.setenv("DEIXIS_MAX_IMAGES_PER_REQUEST", "4")
    monkeypatch.setenv("DEIXIS_MAX_QUEUED_IMAGES", "4")
    monkeypatch.setenv("DEIXIS_REQUEST_TIMEOUT_S", "0.001")
    for number in range(80):
        (folder / "red" / f"more {number}.png").write_bytes(picture("red", (9, 9 + number)))

    done = run("classify", folder, "--group", "-f", "json")

    assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)) == 86


def test_a_group_on_a_server_that_exceeds_the_images_of_a_request_is_an_error(
    run, databases, folder, monkeypatch, where
):
    made(databases / "things")
    monkeypatch.setenv("DEIXIS_MAX_IMAGES_PER_REQUEST", "4")

    done = run("classify", folder, "--group", *where)

    if where:
        assert_refused(done, "DEIXIS_MAX_IMAGES_PER_REQUEST")
    else:
        assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("group", [[], ["--group"]], ids=["alone", "together"])
def test_bad_files_are_reported_and_set_the_exit_status(run, where, databases, folder, tmp_path, group):
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


def test_an_image_below_the_threshold_is_rejected(run, where, databases, folder):
    made(databases / "things")
    for group in ([], ["--group"]):
        done = run("classify", folder, "--reject-below", 1, "-f", "json", *group, *where)
        assert done.exit_code == 0, done.stderr
        assert [each["rejected"] for each in json.loads(done.stdout)] == [True] * 6


def test_invalid_requests_without_labels_are_errors_of_one_line(run, where, databases, folder):
    made(databases / "things")
    assert_refused(run("classify", folder, "--method", "zero-shot", *where), "give labels")
    assert_refused(run("classify", folder, "--method", "auto", *where), "give labels")
    for arguments, message in [
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
            assert_refused(run("classify", folder, *arguments, *group, *where), message)


def test_without_a_database_the_error_names_the_command_that_builds_one(run, where, folder):
    assert_refused(run("classify", folder, *where), "deixis captions build")


# --- the database that comes with it -------------------------------------------------------------------------------


@pytest.fixture
def building(monkeypatch):
    monkeypatch.setenv("DEIXIS_BUILD_DEFAULT_DATABASE", "true")
    monkeypatch.setenv("DEIXIS_DEFAULT_DATABASE", "wordnet")


@pytest.mark.usefixtures("building")
def test_the_first_command_builds_the_default_database_and_the_next_does_not(run, folder, monkeypatch):
    first = run("classify", folder, "-f", "json")
    before = shown(run, "wordnet")
    encoder = CaptionEncoder()
    monkeypatch.setattr("app.cli.backends.in_process.load_encoders", lambda _: [encoder])
    second = run("classify", folder, "-f", "json")

    assert first.exit_code == second.exit_code == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout
    assert shown(run, "wordnet") == before
    assert "golden retriever" not in encoder.encoded_texts


@pytest.mark.usefixtures("building")
def test_a_command_with_labels_or_another_database_builds_nothing(run, databases, folder):
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
def test_an_invalid_request_is_an_error_before_a_database_is_built(run, databases, folder, wrong):
    """With a real model the build takes minutes."""
    assert run("classify", folder, *wrong).exit_code == 2
    assert not databases.exists() or list(databases.iterdir()) == []


# --- how good the names are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [[], ["--group"]], ids=["alone", "together"])
def test_discovered_labels_are_compared_with_the_classes(run, databases, folder, tmp_path, group):
    made(databases / "things")
    file = tmp_path / "report.json"

    done = run("evaluate", folder, "--method", "cased", *group, "--json", file)
    as_json = run("evaluate", folder, "--method", "cased", *group, "--json", "-")

    assert done.exit_code == as_json.exit_code == 0, done.stderr + as_json.stderr
    report = json.loads(file.read_text("utf-8"))
    assert report | {"images_per_s": 0} == json.loads(as_json.stdout) | {"images_per_s": 0}
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
    assert "most frequent names" in done.stdout


def test_subfolders_may_have_other_class_names(run, databases, folder):
    made(databases / "things")

    done = run("evaluate", folder, "--method", "cased", "-n", "red=scarlet thing", "--json", "-")

    assert done.exit_code == 0, done.stderr
    assert set(json.loads(done.stdout)["classes"]) == {"blue", "scarlet thing"}


@pytest.mark.parametrize("group", [[], ["--group"]], ids=["alone", "together"])
def test_bad_images_of_a_folder_are_reported_and_the_rest_is_measured(run, databases, folder, tmp_path, group):
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
    assert_refused(every, "none of its images can be read")


def test_invalid_evaluations_of_discovered_labels_are_errors_of_one_line(run, databases, folder, tmp_path):
    made(databases / "things")
    (tmp_path / "empty").mkdir()
    cased = ("--method", "cased")
    for arguments, message in [
        ([folder, *cased, "-l", "red"], "cased excludes --labels, --label-set and --server"),
        ([folder, *cased, "-s", "things"], "cased excludes --labels, --label-set and --server"),
        ([folder, *cased, "--server", "http://127.0.0.1:9"], "cased excludes --labels, --label-set and --server"),
        ([folder, "--group"], "needs --method cased"),
        ([folder, "-d", "things"], "needs --method cased"),
        ([folder, "--method", "gda", "--group"], "needs --method cased"),
        ([folder, "--method", "all", "-d", "things"], "needs --method cased"),
        ([folder, *cased, "--support", folder], "needs --method all"),
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
        assert_refused(run("evaluate", *arguments), message)
