"""A plain FastAPI service with open_clip: one forward pass per request; text features are cached.

python -m benchmarks.peers.plain FOLDER PORT
"""

import json
import sys
from io import BytesIO
from typing import Annotated

import open_clip
import torch
import uvicorn
from fastapi import FastAPI, File, Form, UploadFile
from PIL import Image

app = FastAPI()
folder, port = sys.argv[1], int(sys.argv[2])
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
model.eval()
tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
cached: dict[str, torch.Tensor] = {}


@app.post("/classify")
def classify(image: Annotated[UploadFile, File()], labels: Annotated[str, Form()]) -> dict[str, float]:
    """Return each label's probability."""
    names = json.loads(labels)
    with torch.inference_mode():
        if labels not in cached:
            cached[labels] = model.encode_text(tokenize([f"a photo of a {name}." for name in names]), normalize=True)
        pixels = preprocess(Image.open(BytesIO(image.file.read())).convert("RGB"))[None]
        logits = model.logit_scale.exp() * model.encode_image(pixels, normalize=True) @ cached[labels].T
        return dict(zip(names, logits.softmax(dim=1)[0].tolist(), strict=True))


uvicorn.run(app, port=port, log_level="warning")
