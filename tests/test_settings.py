import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.errors import ConfigurationError
from app.settings import Settings, load_client_settings, load_settings

SETTINGS_PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

# Guaranteed to operators since the first release, with their default values.
PROMISED = {
    "host": "127.0.0.1",
    "port": 8000,
    "models": ("embedded",),
    "database_url": None,
    "model_cache_dir": None,
    "device": "auto",
    "precision": "auto",
    "request_timeout_s": 30,
    "max_images_per_request": 64,
    "max_image_bytes": 20 * 1024 * 1024,
}


def problem_with(**overrides):
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**overrides)
    return caught.value.message


# --- sources -------------------------------------------------------------------------------------------------------


def test_without_an_environment_every_setting_has_its_default():
    settings = load_settings()
    assert {name: getattr(settings, name) for name in PROMISED} == PROMISED


def test_names_of_environment_variables_are_case_insensitive(monkeypatch):
    monkeypatch.setenv("DEIXIS_PORT", "9001")
    monkeypatch.setenv("DEIXIS_MODELS", "embedded, ViT-B-32/openai")
    monkeypatch.setenv("deixis_max_labels", "7")
    settings = load_settings()
    assert settings.port == 9001
    assert settings.models == ("embedded", "ViT-B-32/openai")
    assert settings.max_labels == 7


def test_a_flag_overrides_the_environment_and_a_missing_flag_does_not(monkeypatch):
    monkeypatch.setenv("DEIXIS_PORT", "9001")
    monkeypatch.setenv("DEIXIS_HOST", "0.0.0.0")
    settings = load_settings(port=9002, host=None)
    assert (settings.host, settings.port) == ("0.0.0.0", 9002)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["DEIXIS_PROT"], ["DEIXIS_PORT"]),
        (["deixis_model"], ["DEIXIS_MODELS"]),
        (["DEIXIS_DATADIR", "DEIXIS_MAX_LABEL"], ["DEIXIS_DATA_DIR", "DEIXIS_MAX_LABELS"]),
        (["DEIXIS_XYZ"], []),
    ],
)
def test_the_error_for_an_unknown_variable_suggests_the_most_similar_setting(monkeypatch, given, meant):
    for name in given:
        monkeypatch.setenv(name, "8000")
    suggested = "".join(f"; did you mean '{name}'?" for name in meant)
    expected = f"unknown setting {', '.join(given)}; `deixis serve --help` lists all settings{suggested}"
    assert problem_with() == expected


def test_the_error_for_an_unknown_choice_suggests_the_most_similar_one(monkeypatch):
    monkeypatch.setenv("DEIXIS_LOG_LEVEL", "Warn")
    monkeypatch.setenv("DEIXIS_KEYS", "require")
    assert "'error'; given: 'Warn'; did you mean 'warning'?" in problem_with()
    assert "did you mean 'required'?" in problem_with()


# --- the configuration file ----------------------------------------------------------------------------------------


@pytest.fixture
def config(monkeypatch, tmp_path):
    """A function that writes the configuration file of ``DEIXIS_CONFIG``."""
    file = tmp_path / "deixis.toml"
    monkeypatch.setenv("DEIXIS_CONFIG", str(file))

    def write(text):
        file.write_text(text, "utf-8")
        return file

    return write


def test_flags_precede_variables_which_precede_the_file_which_precedes_defaults(monkeypatch, config):
    config('host = "a.example"\nport = 1\nmax_labels = 1\nmodels = ["embedded", "ViT-B-32/openai"]\n')
    monkeypatch.setenv("DEIXIS_PORT", "2")
    monkeypatch.setenv("deixis_max_labels", "2")
    settings = load_settings(max_labels=3)
    assert (settings.host, settings.port, settings.max_labels) == ("a.example", 2, 3)
    assert settings.models == ("embedded", "ViT-B-32/openai")
    assert settings.max_classes == 10_000


def test_a_variable_of_another_program_does_not_hide_a_key_of_the_file(monkeypatch, config):
    config("port = 1")
    monkeypatch.setenv("PORT", "2")
    assert load_settings().port == 1


def test_all_kinds_of_values_can_be_in_the_file(config):
    config(
        'models = "embedded,ViT-B-32/openai"\nkeep_images = true\nrequest_timeout_s = 1.5\ndata_dir = "~/x"\n'
        'llm_api_key = "secret"\ncors_origins = ["https://a.example"]\nray_layout = { edges = 2, encoders = "1-8" }\n'
    )
    settings = load_settings()
    assert settings.models == ("embedded", "ViT-B-32/openai")
    assert (settings.keep_images, settings.request_timeout_s) == (True, 1.5)
    assert settings.data_dir == Path("~/x").expanduser()
    assert settings.llm_api_key.get_secret_value() == "secret"
    assert settings.cors_origins == ("https://a.example",)
    assert (settings.ray_layout.edges.max, settings.ray_layout.encoders.max) == (2, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown setting 'prot' in {}; `deixis serve --help` lists all settings; did you mean 'port'?"),
        ("[serve]\nport = 1", "unknown setting 'serve' in {}; `deixis serve --help` lists all settings"),
        (
            'port = "http"',
            "port in {}: Input should be a valid integer, unable to parse string as an integer; given: 'http'",
        ),
        ("port = true", "port in {}: Input should not be a boolean; given: true"),
        ("models = [1]", "models.0 in {}: Input should be a valid string; given: 1"),
        ("data_dir = 1", "data_dir in {}: Input is not a valid path; given: 1"),
        ("max_labels = 0", "max_labels in {}: Input should be greater than or equal to 1; given: 0"),
        ("max_image_bytes = [1]", "max_image_bytes in {}: Input should be a valid integer; given: a list"),
        ('precision = "fp31"', "did you mean 'fp32'?"),
        ("port", "the configuration file {} is not TOML: "),
    ],
)
def test_an_invalid_file_is_an_error_with_the_file_and_the_key(config, text, message):
    file = config(text)
    assert message.format(file) in problem_with()


def test_secrets_of_the_file_are_not_shown(config):
    for text in (
        'llm_api_key = "hunter2"\nport = "x"',
        'database_url = "postgresql://user:hunter2@host/name"\nprot = 1',
        'database_url = ["hunter2"]',
        'llm_api_key = ["hunter2"]',
        "llm_api_key = 20261130",
        'llm_api_key = "hunter2',
    ):
        config(text)
        problem = problem_with()
        assert "hunter2" not in problem
        assert "20261130" not in problem


def test_a_missing_file_is_an_error_and_an_empty_name_is_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("DEIXIS_CONFIG", str(tmp_path / "nowhere.toml"))
    assert problem_with() == f"the configuration file {tmp_path}/nowhere.toml cannot be read: No such file or directory"
    monkeypatch.setenv("DEIXIS_CONFIG", "")
    assert load_settings().port == 8000


def test_without_a_name_only_the_file_in_the_users_folder_is_read(monkeypatch, tmp_path):
    monkeypatch.delenv("DEIXIS_CONFIG")
    monkeypatch.setattr("app.settings.user_config_path", lambda *_, **__: tmp_path / "settings")
    for folder in ("photos", "settings"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    Path("deixis.toml").write_text("port = 1", "utf-8")
    assert load_settings().port == 8000
    (tmp_path / "settings" / "deixis.toml").write_text("port = 2", "utf-8")
    assert load_settings().port == 2


def test_commands_read_their_server_from_the_environment_or_the_file(monkeypatch, config):
    monkeypatch.delenv("DEIXIS_SERVER")
    config('server = "http://a.example"\napi_key = "hunter2"\nnamespace = "acme"')
    settings = load_client_settings()
    assert (settings.server, settings.namespace) == ("http://a.example", "acme")
    assert settings.api_key.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(settings)
    monkeypatch.setenv("DEIXIS_SERVER", "local")
    assert load_client_settings().server == "local"
    assert load_settings().port == 8000


SERVICE_LINKS = {
    "DEIXIS_SERVICE_HOST": "10.0.0.1",
    "DEIXIS_SERVICE_PORT": "8000",
    "DEIXIS_SERVICE_PORT_HTTP": "8000",
    "DEIXIS_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "DEIXIS_PORT_8000_TCP_PROTO": "tcp",
    "DEIXIS_PORT_8000_TCP_PORT": "8000",
    "DEIXIS_PORT_8000_TCP_ADDR": "10.0.0.1",
}


def test_service_link_variables_of_kubernetes_are_ignored(monkeypatch):
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    assert load_settings().port == 8000
    monkeypatch.setenv("DEIXIS_PORT", "9001")
    assert load_settings().port == 9001
    monkeypatch.setenv("DEIXIS_PROT", "1")
    assert problem_with().startswith("unknown setting DEIXIS_PROT; ")


def test_a_service_link_variable_named_like_a_setting_is_an_error_with_advice(monkeypatch):
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DEIXIS_PORT", "tcp://10.0.0.1:8000")
    message = problem_with()
    assert message.startswith("DEIXIS_PORT ")
    assert "Kubernetes" in message
    assert "enableServiceLinks: false" in message
    assert load_settings(port=8001).port == 8001


def test_variables_of_other_programs_are_ignored(monkeypatch):
    monkeypatch.setenv("PORT", "1")
    monkeypatch.setenv("MY_DEIXIS_PORT", "2")
    assert load_settings().port == 8000


def test_an_unknown_flag_is_rejected():
    assert problem_with(prot=8000).endswith("did you mean 'DEIXIS_PORT'?")


def test_settings_are_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().port = 1


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", "http"),
        ("port", ""),
        ("request_timeout_s", "0"),
        ("request_timeout_s", "nan"),
        ("request_timeout_s", "inf"),
        ("request_timeout_s", "-1"),
        ("max_queued_images", "0"),
        ("max_image_bytes", "0"),
        ("max_image_bytes", "20MB"),
        ("max_image_pixels", "0"),
        ("max_images_per_request", "0"),
        ("max_request_bytes", "1.5"),
        ("max_labels", "0"),
        ("max_classes", "0"),
        ("cache_mib", "0"),
        ("image_batch", "0"),
        ("image_batch", "1025"),
        ("max_examples", "0"),
        ("max_examples", "100000001"),
        ("image_backend", "jax"),
        ("ray_layout", "edges=0"),
        ("keep_images", "perhaps"),
        ("keep_images", ""),
        ("decode_threads", "0"),
        ("shutdown_timeout_s", "-1"),
        ("precision", "int4"),
        ("log_format", "xml"),
        ("log_level", "INFO"),
        ("models", ""),
        ("models", " , "),
        ("models", "clip"),
        ("models", "embedded,embedded"),
        ("models", "local-dir:"),
    ],
)
def test_an_invalid_value_is_rejected_with_the_name_of_its_variable(monkeypatch, name, value):
    variable = f"DEIXIS_{name.upper()}"
    monkeypatch.setenv(variable, value)
    message = problem_with()
    assert re.match(rf"{variable}(\.edges)?: ", message)
    assert "pydantic" not in message.lower()
    assert "\n" not in message


def test_all_invalid_values_are_reported_together(monkeypatch):
    monkeypatch.setenv("DEIXIS_PORT", "x")
    monkeypatch.setenv("DEIXIS_MAX_LABELS", "y")
    message = problem_with(precision="z")
    assert all(variable in message for variable in ("DEIXIS_PORT", "DEIXIS_MAX_LABELS", "DEIXIS_PRECISION"))


def test_a_request_limit_above_the_queue_limit_is_an_error_at_the_start():
    message = problem_with(max_images_per_request=65, max_queued_images=64)
    assert "max_images_per_request (65) is above max_queued_images (64)" in message
    assert load_settings(max_images_per_request=64, max_queued_images=64).max_queued_images == 64


@given(st.lists(st.sampled_from(["embedded", "a/b", "hf-hub:o/r", "local-dir:/x y"]), min_size=1, unique=True))
def test_models_can_be_text_or_a_list(models):
    as_text = Settings(models=" , ".join(models))
    assert as_text.models == Settings(models=tuple(models)).models == tuple(models)


# --- folders and the database --------------------------------------------------------------------------------------


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load_settings(data_dir="~/deixis").data_dir == tmp_path / "deixis"
    assert load_settings(model_cache_dir="weights").model_cache_dir == tmp_path / "weights"
    assert load_settings(import_dir="~/pictures").import_dir == tmp_path / "pictures"


def test_by_default_no_files_are_stored_or_imported(monkeypatch):
    assert (load_settings().keep_images, load_settings().import_dir) == (False, None)
    for value, keeps in [("true", True), ("1", True), ("false", False), ("0", False)]:
        monkeypatch.setenv("DEIXIS_KEEP_IMAGES", value)
        assert load_settings().keep_images is keeps


def test_the_default_database_is_a_file_in_the_data_folder(tmp_path):
    assert load_settings(data_dir=tmp_path).effective_database_url == f"sqlite:///{tmp_path}/deixis.sqlite3"
    named = load_settings(data_dir=tmp_path, database_url="postgresql://u:p@h/d")
    assert named.effective_database_url == "postgresql://u:p@h/d"


def test_a_password_is_not_shown(monkeypatch):
    settings = load_settings(database_url="postgresql://user:hunter2@host/name")
    assert "hunter2" not in repr(settings)
    monkeypatch.setenv("DEIXIS_DATABASE_URL", "postgresql://user:hunter2@host/name")
    assert "hunter2" not in problem_with(port="x")


# --- names and documentation ---------------------------------------------------------------------------------------


def test_there_are_at_most_51_settings():
    """Each setting is a decision that an operator must understand; other values are derived or constant."""
    assert len(Settings.model_fields) <= 51


@pytest.mark.parametrize(
    "name",
    [
        *("host", "port", "data_dir", "models", "database_url", "api_keys_file", "request_timeout_s", "device"),
        *("max_queued_images", "max_image_bytes", "max_image_pixels", "max_images_per_request", "allow_image_urls"),
        *("keep_images", "llm_base_url", "llm_api_key", "llm_model", "precision", "log_format"),
    ],
)
def test_a_setting_that_operators_rely_on_still_exists(name):
    assert name in Settings.model_fields


def test_one_budget_limits_all_caches():
    settings = load_settings(cache_mib=2048)
    shares = (settings.class_embedding_cache_bytes, settings.classifier_cache_bytes, settings.fit_cache_bytes)
    assert [share // 2**20 for share in shares] == [512, 512, 1024]
    assert settings.text_feature_store_bytes == 2**30


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_description(name):
    description = Settings.model_fields[name].description
    assert description
    assert description.rstrip("`").endswith((".", "MiB."))


def rows_of_the_settings_page():
    rows = re.findall(r"^\| *`(DEIXIS_[A-Z_]+)`(.*)$", SETTINGS_PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(dict(rows)) == len(rows), "a setting has two rows"
    return dict(rows)


def test_the_settings_page_has_one_row_per_setting():
    assert sorted(rows_of_the_settings_page()) == sorted(f"DEIXIS_{name.upper()}" for name in Settings.model_fields)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_settings_page_has_the_description_and_default_of_each_setting(name):
    field = Settings.model_fields[name]
    row = rows_of_the_settings_page()[f"DEIXIS_{name.upper()}"]
    assert field.description.replace("|", "\\|") in row
    if field.default_factory is None and field.default is not None:
        default = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        assert not default or f"`{default}`" in row


@pytest.mark.parametrize(
    "given", ["app.example.com", "https://app.example.com/", "https://a.com/path", "null", "ftp://a"]
)
def test_an_origin_is_a_scheme_and_a_host(monkeypatch, given):
    monkeypatch.setenv("DEIXIS_CORS_ORIGINS", f"https://fine.example,{given}")
    with pytest.raises(ConfigurationError, match="is not an origin; write a scheme and a host"):
        load_settings()


def test_origins_are_read_from_a_comma_separated_list(monkeypatch):
    monkeypatch.setenv("DEIXIS_CORS_ORIGINS", "https://a.example, http://localhost:3000,http://[::1]:80")
    assert load_settings().cors_origins == ("https://a.example", "http://localhost:3000", "http://[::1]:80")


def test_a_hub_id_of_the_catalogue_is_served_under_the_name_of_its_model(monkeypatch):
    monkeypatch.setenv("DEIXIS_MODELS", "google/siglip2-base-patch16-224, embedded")
    assert load_settings().models == ("ViT-B-16-SigLIP2/webli", "embedded")
    monkeypatch.setenv("DEIXIS_MODELS", "openai/clip-vit-base-patch32,ViT-B-32-quickgelu/openai")
    with pytest.raises(ConfigurationError, match="repeated"):
        load_settings()
