"""An encoder that waits until a test releases it."""

import threading

from app.encoders.fake import FakeEncoder


class GatedEncoder(FakeEncoder):
    """Waits inside a tower while the gate of the tower is closed."""

    def __init__(self, name="fake", **options):
        super().__init__(name, **options)
        self.images_open, self.texts_open = threading.Event(), threading.Event()
        self.images_entered, self.texts_entered = threading.Semaphore(0), threading.Semaphore(0)
        self.images_open.set()
        self.texts_open.set()
        self.threads = {"transform": set(), "images": set(), "texts": set()}

    def transform(self, image):
        self.threads["transform"].add(threading.current_thread())
        return super().transform(image)

    def encode_images(self, pixels):
        self.threads["images"].add(threading.current_thread())
        self.images_entered.release()
        assert self.images_open.wait(10)
        return super().encode_images(pixels)

    def encode_texts(self, texts):
        self.threads["texts"].add(threading.current_thread())
        self.texts_entered.release()
        assert self.texts_open.wait(10)
        return super().encode_texts(texts)

    def open(self):
        """Open both gates permanently."""
        self.images_open.set()
        self.texts_open.set()
