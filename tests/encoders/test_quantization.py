"""A quantised image tower is used only after its predictions were compared, and never instead of a damaged one."""

import json
import shutil
from hashlib import sha256
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs
from typer.testing import CliRunner

from app.cli.models import models_cli
from app.encoders import quantization, tuning
from app.encoders._base import Candidate, LoadOptions
from app.encoders.loading import check_takes_int8, export_model, load_encoder
from app.encoders.openvino_tower import compile_image_tower, import_openvino
from app.encoders.quantization import check_can_quantise, quantise_tower, read_int8
from app.encoders.tuning import list_candidates, probe_images
from app.errors import ModelUnavailableError
from tests.conftest import picture
from tests.encoders.test_open_clip import write_model


def options(folder, **others):
    return LoadOptions(**{"device": "cpu", "data_dir": folder, "exports_dir": folder / "exports", **others})


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def exported(spec, tmp_path_factory):
    return export_model(spec, options(tmp_path_factory.mktemp("exported")))


@pytest.fixture
def export(exported, tmp_path):
    """The folder of a fresh export, in the data folder ``tmp_path``."""
    return shutil.copytree(exported, tmp_path / "exports" / exported.name)


@pytest.fixture(scope="module")
def pixels(exported):
    size_px = json.loads((exported / "export.json").read_text())["preprocessing"]["size_px"]
    return probe_images(size_px, count=quantization.MIN_IMAGES)


def same(model, calibration):
    """Return a tower with other weights in the file but the same features."""
    return model


def inverted(model, calibration):
    """Return a tower whose features point the other way."""
    ov = import_openvino()
    from openvino import opset13 as ops

    result = model.get_results()[0]
    return ov.Model([ops.negative(result.input_value(0))], model.get_parameters(), "inverted")


@pytest.fixture
def compared(monkeypatch):
    """Set what the comparison of the speed returns."""

    def returning(speed_up, refused):
        monkeypatch.setattr(quantization, "compare_towers", lambda *_, **__: (speed_up, refused))

    returning(2.0, None)
    return returning


def quantised(export, pixels, quantise=same):
    texts = np.eye(8, dtype=np.float32)
    return quantise_tower(
        export,
        image_tower="image.xml",
        fingerprint="of fp32",
        pixels=pixels,
        texts=texts,
        best=compile_image_tower(export / "image.xml", "fp32"),
        seconds=0.1,
        quantise=quantise,
    )


def int8_files(export):
    """Return the files of int8 by name; all that an accepted tower needs, and no other, or none."""
    files = {file.name: file.read_bytes() for file in export.iterdir() if "int8" in file.name}
    if files:
        assert files.keys() == {"int8.json", *json.loads(files["int8.json"])["checksums"]}
    return files


def one_of(folder, suffix):
    (file,) = folder.glob(f"image-int8*{suffix}")
    return file


# --- acceptance ----------------------------------------------------------------------------------------------------


def test_a_faster_tower_with_the_same_predictions_serves_later_starts_with_its_own_fingerprint(
    spec, export, pixels, compared, tmp_path
):
    full = load_encoder(spec, options(tmp_path))
    trial = quantised(export, pixels)
    assert (trial.refused, trial.agreement, trial.speed_up) == (None, 1.0, 2.0)
    assert (trial.calibration_images, trial.held_out_images, trial.labels) == (100, 200, 8)
    for precision in ("auto", "int8"):
        encoder = load_encoder(spec, options(tmp_path, precision=precision))
        assert encoder.image_path.precision == "int8"
        assert encoder.image_fingerprint() != full.image_fingerprint()
        assert encoder.text_fingerprint() == full.text_fingerprint()
        assert (encoder.encode_images(pixels[:3]) * full.encode_images(pixels[:3])).sum(axis=1).min() > 0.999
    again = load_encoder(spec, options(tmp_path, precision="fp32"))
    assert (again.image_path.precision, again.image_fingerprint()) == ("fp32", full.image_fingerprint())
    assert not [file for file in export.iterdir() if file.name.startswith(".")]


def test_the_batch_size_in_int8_is_measured_per_machine(spec, export, pixels, compared, tmp_path):
    quantised(export, pixels)
    measured = load_encoder(spec, options(tmp_path, tuning_seconds=0.5, measure_again=True))
    assert measured.tuning.trials[0].rates
    assert [trial.candidate.precision for trial in measured.tuning.trials] == ["int8"]


def test_a_tower_with_other_predictions_is_refused_and_nothing_is_stored(spec, export, pixels, compared, tmp_path):
    trial = quantised(export, pixels, inverted)
    assert trial.agreement < 0.995
    assert trial.speed_up is None
    assert "predictions differ" in trial.refused
    assert not int8_files(export)
    assert load_encoder(spec, options(tmp_path)).image_path.precision != "int8"


@pytest.mark.parametrize(("others", "accepted"), [(1, True), (2, False)])
def test_one_other_prediction_in_200_is_allowed_and_two_are_not(
    export, pixels, compared, monkeypatch, others, accepted
):
    features = quantization._features
    towers = []

    def some_others(tower, images):
        towers.append(tower)
        rows = features(tower, images)
        if len(towers) == 2:  # the quantised one
            rows[:others] *= -1
        return rows

    monkeypatch.setattr(quantization, "_features", some_others)
    assert (quantised(export, pixels).refused is None) is accepted


def test_a_tower_that_is_not_faster_is_refused(export, pixels, compared):
    compared(1.02, "not clearly faster: a ratio of 1.1 is needed")
    trial = quantised(export, pixels)
    assert (trial.agreement, trial.speed_up) == (1.0, 1.02)
    assert trial.refused.startswith("not clearly faster")
    assert not int8_files(export)


def test_a_tower_stays_until_another_replaces_it(export, pixels, compared, monkeypatch):
    quantised(export, pixels)
    first = int8_files(export)
    assert first

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantised(export, pixels, stop)
    assert int8_files(export) == first
    assert "accepted before stays in use" in quantised(export, pixels, inverted).refused
    assert int8_files(export) == first
    compared(1.0, "other processes used the CPU")
    assert "accepted before stays in use" in quantised(export, pixels).refused
    assert int8_files(export) == first

    compared(3.0, None)
    with monkeypatch.context() as failing:
        failing.setattr(quantization, "write_atomically", stop)
        with pytest.raises(KeyboardInterrupt):  # the last moment before the new one is accepted
            quantised(export, pixels)
    assert first.items() <= {file.name: file.read_bytes() for file in export.iterdir()}.items()
    quantised(export, pixels)
    assert not first.keys() & int8_files(export).keys() - {"int8.json"}
    assert json.loads((export / "int8.json").read_text())["speed_up"] == 3.0


# --- other processors ----------------------------------------------------------------------------------------------


@pytest.fixture
def processor(monkeypatch):
    """Set the instructions that the CPU seems to have."""

    def having(*, bf16, int8):
        for module in (quantization, tuning):
            monkeypatch.setattr(module, "has_bf16_instructions", lambda: bf16)
            monkeypatch.setattr(module, "has_int8_instructions", lambda: int8)

    return having


def test_other_operations_run_in_the_recorded_precision_on_a_newer_processor_too(
    spec, export, pixels, compared, processor, tmp_path
):
    processor(bf16=False, int8=True)
    quantised(export, pixels)
    assert json.loads((export / "int8.json").read_text())["precision"] == "fp32"
    rows = load_encoder(spec, options(tmp_path)).encode_images(pixels[:1])
    processor(bf16=True, int8=True)
    encoder = load_encoder(spec, options(tmp_path))
    assert encoder.image_path.precision == "int8"
    assert "float32" in str(encoder._image_tower._on_all_cores._compiled.get_property("INFERENCE_PRECISION_HINT"))
    np.testing.assert_array_equal(encoder.encode_images(pixels[:1]), rows)


@pytest.mark.parametrize(
    ("was", "now", "problem"),
    [
        ({"bf16": True, "int8": True}, {"bf16": False, "int8": True}, "with instructions for bf16"),
        ({"bf16": False, "int8": True}, {"bf16": False, "int8": False}, "with instructions for int8"),
        ({"bf16": False, "int8": False}, {"bf16": False, "int8": True}, "without instructions for int8"),
    ],
)
def test_a_tower_is_not_used_where_its_features_would_be_others_and_stays(
    spec, export, pixels, compared, processor, monkeypatch, tmp_path, was, now, problem
):
    monkeypatch.setattr(quantization, "compile_image_tower", lambda file, _: compile_image_tower(file, "fp32"))
    processor(**was)
    quantised(export, pixels)
    files = int8_files(export)
    processor(**now)
    with capture_logs() as logs:
        assert load_encoder(spec, options(tmp_path)).image_path.precision != "int8"
    (reason,) = [entry["reason"] for entry in logs if entry["event"] == "int8_not_used"]
    assert f"on a CPU {problem}, unlike this one; run `deixis models tune {spec} --calibration" in reason
    export_model(spec, options(tmp_path))
    assert int8_files(export) == files


def test_features_of_processors_that_compute_differently_have_different_fingerprints(
    export, pixels, compared, processor, monkeypatch
):
    monkeypatch.setattr(quantization, "compile_image_tower", lambda file, _: compile_image_tower(file, "fp32"))
    fingerprints = set()
    for bf16, int8 in ((True, True), (False, True), (False, False), (True, True)):
        processor(bf16=bf16, int8=int8)
        quantised(export, pixels)
        fingerprints.add(json.loads((export / "int8.json").read_text())["image_fingerprint"])
    assert len(fingerprints) == 3


def test_speed_is_compared_in_turns_and_a_busy_machine_decides_nothing(monkeypatch):
    class Tower:
        streams = 1

        def __init__(self, passes):
            self.passes = passes

        def begin(self, pixels, *, alone=True):
            return lambda: [sum(range(20_000)) for _ in range(self.passes)]

    slow, fast = Tower(4), Tower(1)
    probes = probe_images(8, count=2)
    monkeypatch.setattr(tuning.OtherProcesses, "share", lambda self: 0.0)
    speed_up, refused = tuning.compare_towers(slow, fast, probes, seconds=0.2)
    assert speed_up > 1.5
    assert refused is None
    speed_up, refused = tuning.compare_towers(fast, slow, probes, seconds=0.2)
    assert speed_up < 1
    assert refused.startswith("not clearly faster")
    monkeypatch.setattr(tuning.OtherProcesses, "share", lambda self: 0.5)
    assert "other processes" in tuning.compare_towers(slow, fast, probes, seconds=0.2)[1]


# --- files ---------------------------------------------------------------------------------------------------------

DAMAGES = {
    "other weights": lambda folder: one_of(folder, ".bin").write_bytes(b"other"),
    "a missing file": lambda folder: one_of(folder, ".xml").unlink(),
    "no JSON": lambda folder: (folder / "int8.json").write_text("{"),
    "of another export": lambda folder: (folder / "int8.json").write_text(
        json.dumps({**json.loads((folder / "int8.json").read_text()), "exported_weights": "other"})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tower_is_logged_and_the_model_runs_as_before(spec, export, pixels, compared, tmp_path, damage):
    full = load_encoder(spec, options(tmp_path)).image_fingerprint()
    quantised(export, pixels)
    DAMAGES[damage](export)
    with capture_logs() as logs:
        encoder = load_encoder(spec, options(tmp_path))
    assert encoder.image_path.precision != "int8"
    assert encoder.image_fingerprint() == full
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["int8_not_used"]
    with pytest.raises(ModelUnavailableError, match=r"models tune .* --calibration FOLDER"):
        load_encoder(spec, options(tmp_path, precision="int8"))


def test_the_other_precisions_can_be_measured_beside_the_tower(spec, export, pixels, compared, tmp_path):
    quantised(export, pixels)
    files = int8_files(export)
    measured = load_encoder(spec, options(tmp_path, measure_again=True, ignore_int8=True, tuning_seconds=0.1))
    assert measured.tuning is not None
    assert measured.image_path.precision != "int8"
    assert int8_files(export) == files
    assert load_encoder(spec, options(tmp_path)).image_path.precision == "int8"


def test_a_new_export_keeps_the_tower_of_the_same_weights(spec, export, pixels, compared, tmp_path):
    quantised(export, pixels)
    files = int8_files(export)
    export_model(spec, options(tmp_path))
    assert int8_files(export) == files
    assert load_encoder(spec, options(tmp_path)).image_path.precision == "int8"
    DAMAGES["of another export"](export)
    export_model(spec, options(tmp_path))
    assert not int8_files(export)


def test_a_hub_id_names_the_model_to_quantise(monkeypatch, tmp_path):
    def refused(model, _):
        raise ModelUnavailableError(f"asked for {model}")

    (tmp_path / "a.png").write_bytes(picture("red"))
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr("app.cli.model_loading.configure_logs", lambda *_: None)
    monkeypatch.setattr("app.cli.model_loading.check_can_quantise", lambda _: None)
    monkeypatch.setattr("app.cli.model_loading.check_takes_int8", refused)
    command = ["tune", "openai/clip-vit-base-patch32", "--calibration", str(tmp_path)]
    assert "asked for ViT-B-32-quickgelu/openai" in CliRunner().invoke(models_cli, command).stderr


# --- requests that cannot be met -----------------------------------------------------------------------------------


def test_int8_without_a_tower_is_an_error_with_the_way_out(spec, tmp_path):
    for refused, way_out in (
        (lambda: load_encoder(spec, options(tmp_path, precision="int8")), "--calibration FOLDER"),
        (lambda: load_encoder("embedded", LoadOptions(precision="int8")), "DEIXIS_PRECISION=auto"),
        (lambda: check_takes_int8("embedded", options(tmp_path)), "DEIXIS_PRECISION=auto"),
        (lambda: check_takes_int8(spec, options(tmp_path, backend="torch")), "DEIXIS_IMAGE_BACKEND"),
        (lambda: list_candidates("cuda", LoadOptions(precision="int8")), "DEIXIS_DEVICE=cpu"),
    ):
        with pytest.raises(ModelUnavailableError, match=way_out):
            refused()


def test_int8_is_a_candidate_only_on_request():
    assert all(each.precision != "int8" for each in list_candidates("cpu", LoadOptions()))
    (only,) = list_candidates("cpu", LoadOptions(precision="int8"))
    assert (only.backend, only.precision) == ("openvino", "int8")
    assert isinstance(only, Candidate)


@pytest.mark.parametrize(("installed", "images", "problem"), [(False, 300, "quantization"), (True, 299, "300")])
def test_missing_packages_and_images_are_reported_before_work(monkeypatch, installed, images, problem):
    monkeypatch.setattr(quantization, "is_installed", lambda package: installed)
    with pytest.raises(ModelUnavailableError, match=problem):
        check_can_quantise(images)


@pytest.mark.skipif(find_spec("nncf") is None, reason="needs nncf")
@pytest.mark.filterwarnings("ignore")
def test_nncf_quantises_weights_and_activations(export, pixels, compared):
    trial = quantised(export, pixels, quantise=None)
    assert trial.min_cosine > 0.9
    assert trial.agreement > 0.8
    core = import_openvino().Core()
    model = quantization._quantise(core.read_model(export / "image.xml"), pixels[:20])
    kinds = [each.get_type_name() for each in model.get_ops()]
    assert "FakeQuantize" in kinds
    assert any(
        each.get_element_type() == import_openvino().Type.i8
        for each in model.get_ops()
        if each.get_type_name() == "Constant"
    )


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tune(spec, tmp_path, monkeypatch):
    """Run ``deixis models tune`` in a data folder of its own, as if NNCF were installed."""
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DEIXIS_DEVICE", "cpu")
    monkeypatch.setattr(quantization, "is_installed", lambda package: True)
    monkeypatch.setattr(quantization, "_quantise", same)

    def run(*arguments):
        return CliRunner().invoke(models_cli, ["tune", spec, "--seconds", "1", *arguments], env={"COLUMNS": "200"})

    return run


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos" / "of things"
    folder.mkdir(parents=True)
    for index, pixels in enumerate(probe_images(16, count=quantization.MIN_IMAGES)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder.parent


def test_the_command_prints_the_evidence_and_later_starts_use_int8(spec, tune, photos, compared, tmp_path):
    result = tune("--calibration", str(photos), "--labels", "cat, dog")
    assert result.exit_code == 0, result.output
    assert "200 of 200 predictions of 2 labels are the same (100.00%)" in result.stdout
    assert "2.00 times as fast" in result.stdout
    assert "accepted" in result.stdout
    data = tmp_path / "data"
    assert load_encoder(spec, options(data)).image_path.precision == "int8"
    (photos / "of things" / "0.png").write_bytes(b"no image")
    assert "has 299 readable images" in tune("--calibration", str(photos)).output
    assert load_encoder(spec, options(data)).image_path.precision == "int8"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--labels", "cat, dog"], "only --calibration"),
        (["--calibration", "PHOTOS", "--labels", "cat, cat"], "has 1 labels"),
        (["--calibration", "PHOTOS/no"], "no"),
    ],
)
def test_the_command_refuses_what_would_show_nothing(tune, photos, arguments, problem):
    result = tune(*(each.replace("PHOTOS", str(photos)) for each in arguments))
    assert result.exit_code == 2
    assert problem in result.output


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "."])
def test_a_tower_whose_files_are_elsewhere_is_not_read(export, pixels, compared, name):
    quantised(export, pixels)
    manifest = export / "int8.json"
    members = json.loads(manifest.read_text("utf-8"))
    (export.parent / "outside.bin").write_bytes(b"content")
    for changed in ({"checksums": {**members["checksums"], name: sha256(b"content").hexdigest()}}, {"tower": name}):
        manifest.write_text(json.dumps({**members, **changed}), "utf-8")
        with pytest.raises(ValueError, match="another folder"):
            read_int8(export, members["exported_weights"])
