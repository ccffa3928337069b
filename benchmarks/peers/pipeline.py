"""The transformers pipeline for zero-shot image classification, behind FastAPI.

python -m benchmarks.peers.pipeline FOLDER PORT
"""

import base64
import sys
from io import BytesIO

import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel
from transformers import pipeline

app = FastAPI()
folder, port = sys.argv[1], int(sys.argv[2])
classifier = pipeline("zero-shot-image-classification", model=folder)


class Body(BaseModel):
    """An image in base64, and the labels to choose from."""

    image: str
    labels: list[str]


@app.post("/classify")
def classify(body: Body) -> list[dict[str, object]]:
    """Return each label's probability."""
    picture = Image.open(BytesIO(base64.b64decode(body.image))).convert("RGB")
    found: list[dict[str, object]] = classifier(picture, candidate_labels=body.labels)
    return found


uvicorn.run(app, port=port, log_level="warning")
