"""A plain FastAPI service with open_clip: one forward pass per request; text features are cached.

python -m benchmarks.peers.plain FOLDER PORT
"""

import base64
import sys
from io import BytesIO

import open_clip
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

app = FastAPI()
folder, port = sys.argv[1], int(sys.argv[2])
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
model.eval()
tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
cached: dict[tuple[str, ...], torch.Tensor] = {}


class Body(BaseModel):
    """An image in base64, and the labels to choose from."""

    image: str
    labels: tuple[str, ...]


@app.post("/classify")
def classify(body: Body) -> dict[str, float]:
    """Return each label's probability."""
    names = body.labels
    with torch.inference_mode():
        if names not in cached:
            cached[names] = model.encode_text(tokenize([f"a photo of a {name}." for name in names]), normalize=True)
        pixels = preprocess(Image.open(BytesIO(base64.b64decode(body.image))).convert("RGB"))[None]
        logits = model.logit_scale.exp() * model.encode_image(pixels, normalize=True) @ cached[names].T
        return dict(zip(names, logits.softmax(dim=1)[0].tolist(), strict=True))


uvicorn.run(app, port=port, log_level="warning")
