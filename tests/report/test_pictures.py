import base64
import io

import numpy as np
import pytest
from PIL import Image

from amg.report.pictures import PictureStore


def decode(uri):
    prefix, text = uri.split(",", 1)
    assert prefix == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))).convert("RGB"))


def test_pixels_come_back_exactly(make):
    store = PictureStore()
    given = [make.image(0), make.image(1, 64), np.repeat(make.image(2)[:, :, :1], 3, 2)]
    for picture in given:
        np.testing.assert_array_equal(decode(store.uris[store.add(picture)]), picture)


def test_the_same_picture_is_kept_once_whatever_its_form(make):
    store, picture = PictureStore(), make.image(3)
    assert store.add(picture) == store.add(Image.fromarray(picture)) == store.add(picture.copy()) == 0
    assert store.add(make.image(4)) == 1
    assert len(store.uris) == 2


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8), np.zeros(4, np.uint8)]
)
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(ValueError, match="`picture` must be uint8"):
        PictureStore().add(bad)
