"""The transformers pipeline for zero-shot image classification, behind FastAPI.

python -m benchmarks.peers.pipeline FOLDER PORT
"""

import json
import sys
from io import BytesIO
from typing import Annotated

import uvicorn
from fastapi import FastAPI, File, Form, UploadFile
from PIL import Image
from transformers import pipeline

app = FastAPI()
folder, port = sys.argv[1], int(sys.argv[2])
classifier = pipeline("zero-shot-image-classification", model=folder)


@app.post("/classify")
def classify(image: Annotated[UploadFile, File()], labels: Annotated[str, Form()]) -> list[dict[str, object]]:
    """Return each label's probability."""
    picture = Image.open(BytesIO(image.file.read())).convert("RGB")
    found: list[dict[str, object]] = classifier(picture, candidate_labels=json.loads(labels))
    return found


uvicorn.run(app, port=port, log_level="warning")
