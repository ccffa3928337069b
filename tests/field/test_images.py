"""Reports about single images: strange, damaged, huge, rotated, or in another colour mode."""

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from app.encoders.fake import FakeEncoder
from app.scoring.numerics import unit_rows
from tests.api.problems import problem_of
from tests.conftest import picture
from tests.field.asking import best_of, classify, classify_json, embed, encoded, results_of, saved
from tests.field.reports import report


class TopEncoder(FakeEncoder):
    """Sees the upper half of an image only."""

    def transform(self, image):
        return super().transform(image.crop((0, 0, image.width, image.height // 2)))


class BrightnessEncoder(FakeEncoder):
    """Takes bright images for red ones, and dark images for blue ones."""

    def encode_images(self, pixels):
        brightness = np.stack(pixels).mean(axis=(1, 2, 3)) / 255
        features = np.zeros((len(pixels), self.embed_dim), np.float32)
        features[:, 0], features[:, 2] = brightness, 1 - brightness
        return unit_rows(features)


@report("michaelfeil/infinity#367", "After one image of 1x1 pixels, every further request for features hung.")
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA"])
def test_an_image_of_one_pixel_is_embedded_and_so_is_the_next(shared_client, mode):
    tiny = saved(Image.new(mode, (1, 1)))
    assert embed(shared_client, encoded(tiny), modality="image").status_code == 200
    assert embed(shared_client, encoded(picture("red")), modality="image").status_code == 200


@report("michaelfeil/infinity#609", "A truncated image stopped the worker, while the health route went on to say 200.")
def test_a_truncated_image_is_refused_and_the_service_goes_on(shared_client):
    cut = picture("red", (200, 200), "JPEG")[:-300]
    problem_of(embed(shared_client, encoded(cut), modality="image"), "not-an-image")
    assert shared_client.get("/healthz").status_code == 200
    assert best_of(classify(shared_client, picture("blue"))) == ["blue"]


@report("weaviate/multi2vec-clip-inference#2", "A PNG with a palette was refused, because the model wants RGB.")
def test_a_palette_image_is_classified_by_its_colours(shared_client):
    palette = Image.new("RGB", (20, 20), "green").convert("P", palette=Image.Palette.ADAPTIVE)
    assert best_of(classify(shared_client, saved(palette), saved(palette, "GIF"))) == ["green"] * 2


@report("huggingface/sentence-transformers#1309", "Features of a PNG with an alpha channel failed; JPEG files worked.")
def test_an_image_with_alpha_has_the_features_of_the_same_image_without(shared_client):
    plain, alpha = Image.new("RGB", (20, 20), "red"), Image.new("RGBA", (20, 20), (255, 0, 0, 255))
    reply = embed(shared_client, [encoded(saved(plain)), encoded(saved(alpha))], modality="image").json()["data"]
    assert reply[0]["embedding"] == reply[1]["embedding"]


@report("openai/CLIP#422", "Nobody could say which colour the transparent parts of a screenshot become.")
def test_transparent_pixels_become_white_whatever_colour_they_hide(shared_client):
    screenshot = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    screenshot.paste((0, 0, 255, 255), (0, 0, 20, 10))
    assert best_of(classify(shared_client, saved(screenshot))) == ["blue"]


@report("thygate/stable-diffusion-webui-depthmap-script#157", "Grey images and images with alpha crashed a batch.")
def test_images_of_all_modes_are_classified_in_one_request(shared_client):
    images = [saved(Image.new(mode, (9, 9))) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    assert all(each["error"] is None for each in results_of(classify(shared_client, *images)))


@report("unslothai/unsloth#10094", "A 16-bit grey image was clipped, so that nearly all of it became white.")
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_a_dark_16_bit_image_stays_dark(make_client, file_format):
    dark = Image.fromarray(np.full((16, 16), 9_000, np.uint16))
    client = make_client([BrightnessEncoder()])
    assert best_of(classify(client, saved(dark, file_format))) == ["blue"]


@report("pbs/its#111", "JPEG files in CMYK came out in wrong colours.")
def test_a_cmyk_jpeg_has_its_colours(shared_client):
    images = [saved(Image.new("RGB", (20, 20), colour).convert("CMYK"), "JPEG") for colour in ("red", "blue")]
    assert best_of(classify(shared_client, *images)) == ["red", "blue"]


@report("ollama/ollama#18418", "Photographs with an EXIF orientation reached the model upside down.")
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)],
)
def test_a_photograph_is_turned_upright(make_client, orientation, stored):
    upright = Image.new("RGB", (32, 32), "blue")
    upright.paste("red", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph = saved(upright.transpose(stored), "JPEG", exif=exif)
    assert best_of(classify(make_client([TopEncoder()]), photograph)) == ["red"]


@report("python-pillow/Pillow#8363", "A PNG with a text of more than 1 MB could not be opened; other programs open it.")
def test_a_png_with_a_large_text_is_classified(shared_client):
    notes = PngInfo()
    notes.add_itxt("workflow", "node " * 400_000, zip=True)
    assert best_of(classify(shared_client, saved(Image.new("RGB", (20, 20), "red"), pnginfo=notes))) == ["red"]


@report("KatherLab/STAMP#76", "Tiles failed because their colour profile was larger than 1 MB.")
def test_a_png_with_a_large_colour_profile_is_classified(shared_client):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(1_600_000)
    assert best_of(classify(shared_client, saved(Image.new("RGB", (20, 20), "red"), icc_profile=profile))) == ["red"]


@report("libvips/libvips#2958", "A photograph was refused because it had more than 50 text chunks.")
def test_a_png_with_many_texts_is_classified(shared_client):
    notes = PngInfo()
    for number in range(80):
        notes.add_text(f"exif:Field{number}", "value")
    assert best_of(classify(shared_client, saved(Image.new("RGB", (20, 20), "red"), pnginfo=notes))) == ["red"]


@report("matrix-org/synapse#10028", "A small file with very many pixels gave status 500.")
def test_too_many_pixels_are_a_refusal_that_names_the_limit(make_client):
    client = make_client(max_image_pixels=1_000_000)
    many = saved(Image.new("1", (2_000, 2_000)))
    assert len(many) < 20_000
    assert "1000000" in problem_of(classify(client, many), "image-too-large")["detail"].replace(",", "").replace(
        "_", ""
    )
    assert best_of(classify(client, many, picture("red"))) == [None, "red"]


@report("edenai/edenai-apis#183", "A HEIC photograph with the name and type of a JPEG was an internal error.")
def test_a_heic_image_with_the_name_of_a_jpeg_is_classified(shared_client):
    heif = pytest.importorskip("pillow_heif")
    photograph = ("photo.jpg", _heic(heif, "blue"), "image/jpeg")
    assert best_of(classify(shared_client, photograph)) == ["blue"]


def _heic(heif, colour):
    from io import BytesIO

    file = BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 64), colour)).save(file)
    return file.getvalue()


@report("WildMeOrg/Wildbook#1609", "A JPEG with an unknown marker passed the check, and held up the whole import.")
def test_a_jpeg_with_a_wrong_marker_is_refused_at_once(shared_client):
    damaged = picture("red", (64, 64), "JPEG").replace(b"\xff\xda", b"\xff\x02")
    assert best_of(classify(shared_client, picture("red"), damaged, picture("blue"))) == ["red", None, "blue"]


@report("rom1504/clip-retrieval#330", "One empty or unreadable file ended the encoding of a whole data set.")
def test_an_empty_image_fails_alone(shared_client):
    results = results_of(classify(shared_client, picture("red"), b"", picture("blue")))
    assert [each["error"] and each["error"]["status"] for each in results] == [None, 415, None]
    assert "empty" in results[1]["error"]["detail"]


@report(
    "jina-ai/clip-as-service#906", "A batch failed as a whole, and did not say which of its images was the bad one."
)
def test_the_bad_image_of_a_request_is_known_by_its_place(shared_client):
    images = [encoded(picture(colour)) for colour in ("red", "green", "blue")]
    images.insert(2, encoded(b"<html>404 not found</html>"))
    response = classify_json(shared_client, *images)
    assert best_of(response) == ["red", "green", None, "blue"]
    assert "HTML" in results_of(response)[2]["error"]["detail"]


@report(
    "vllm-project/semantic-router#2462", "`DATA:` in capitals gave no result, and base64 of a text gave status 500."
)
def test_capitals_in_a_data_url_do_not_matter_and_a_text_in_it_is_a_refusal(shared_client):
    assert best_of(classify_json(shared_client, f"DATA:IMAGE/PNG;BASE64,{encoded(picture('red'))}")) == ["red"]
    refused = classify_json(shared_client, f"data:image/png;base64,{encoded(b'only some words')}")
    assert problem_of(refused, "not-an-image")["status"] == 415


@report("michaelfeil/infinity#391", "Images could be sent as public addresses only, and not as `data:` URLs.")
def test_features_of_an_image_in_a_data_url(shared_client):
    url = f"data:image/jpeg;base64,{encoded(picture('red', file_format='JPEG'))}"
    assert len(embed(shared_client, [url], modality="image").json()["data"]) == 1


@report("matatonic/openedai-vision#4", "A base64 image without its last equals sign was an internal error.")
def test_base64_without_padding_is_read(shared_client):
    for length in range(3):
        unpadded = encoded(picture("red") + bytes(length)).rstrip("=")
        assert best_of(classify_json(shared_client, f"data:image/png;base64,{unpadded}", unpadded)) == ["red"] * 2
