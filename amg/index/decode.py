"""Encoded bytes or a PIL image → uint8 RGB, by stated rules; which formats are opened at all."""

from __future__ import annotations

import io
import math
import re
import sys
from typing import Any, NamedTuple

import torch

from amg.extras import needed
from amg.index.errors import IndexBuildError
from amg.index.notes import Note

# The formats that are opened, as Pillow names them, and the suffixes of each. Only raster pictures, and none
# that Pillow hands to another program (EPS, PDF, WMF). TGA has no signature and is taken by its suffix alone.
RASTER_FORMATS = {
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp", ".dib"),
    "DDS": (".dds",),
    "GIF": (".gif",),
    "ICO": (".ico",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "PCX": (".pcx",),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
    "SGI": (".sgi",),
    "SUN": (".ras",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in RASTER_FORMATS.values() for suffix in suffixes)
RUNS_PROGRAMS = ("EPS", "PDF", "WMF")

FRAMES, FRAME_FILES = "frames after the first, left out", "files with frames after the first"
MOST_PIXELS = 1 << 25  # 100 MB of uint8, 400 MB of float32
REDUCED = "larger than 33 megapixels, reduced"
FRAMES_DAMAGED = "later frames are damaged and not counted"
HIGH_BYTES = "16-bit colour read by its high bytes alone"
BITS_TAG, PLANAR_TAG = 258, 284  # of TIFF
DEPTHS = (8, 10, 12, 14, 16)
DEPTH_RULE = "16 bits a channel to 8 by the file's own range"
# a raw mode that takes the high byte of each 16-bit channel, and the one that takes the low byte
_LITTLE, _BIG = (";16L", ";16B") if sys.byteorder == "little" else (";16B", ";16L")
_OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": _BIG}
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class UnreadableImage(ValueError):
    """One image cannot be decoded; the build skips it or stops, as its `on_error` says."""


class MissingImage(UnreadableImage):
    """An image that others speak of (a failed download, a name in a table) and that is not there: counted as
    skipped, never an error."""


class Picture(NamedTuple):
    """pixels: [3, H, W], uint8 or float32 in [0, 1]; notes: what was done to get them."""

    pixels: torch.Tensor
    notes: tuple[Note, ...] = ()


def import_pil() -> Any:
    """PIL.Image, or an error that names the extra to install."""
    return needed("PIL.Image", "reading images")


def check_background(background: Any) -> str:
    """The colour that transparent pictures are shown over: "white", "black" or "#rrggbb", in lower case."""
    text = background.lower() if isinstance(background, str) else ""
    if text not in ("white", "black") and not re.fullmatch("#[0-9a-f]{6}", text):
        raise IndexBuildError(
            f'`background` must be "white", "black" or a colour "#rrggbb", got {background!r}'
        )
    return {"#ffffff": "white", "#000000": "black"}.get(text, text)


def _colour(background: str) -> tuple[int, ...]:
    named = {"white": "#ffffff", "black": "#000000"}
    return tuple(bytes.fromhex(named.get(background, background)[1:]))


def open_picture(content: bytes, name: str = "") -> Any:
    """Encoded bytes as a PIL image in one of RASTER_FORMATS; name: tells TGA. Raises what Pillow raises."""
    image_module = import_pil()
    image_module.init()
    tga = name.lower().endswith(RASTER_FORMATS["TGA"])
    formats = [kind for kind in RASTER_FORMATS if kind in image_module.OPEN and (tga or kind != "TGA")]
    return image_module.open(io.BytesIO(content), formats=formats)


def decode_image(
    content: bytes, name: str = "", background: str | None = "white", least: int | None = None
) -> Picture:
    """Encoded image bytes → Picture, as to_picture() makes it. Raises UnreadableImage.

    least: so many pixels a side are enough: a JPEG is decoded at the smallest of its reduced sizes (a half, a
    quarter, an eighth) that has them.
    """
    image_module = import_pil()
    if content.lstrip()[:4] == b"%!PS" or content.startswith((b"\xc5\xd0\xd3\xc6", b"%PDF")):
        raise UnreadableImage("PostScript or PDF, which is not read: another program would have to draw it")
    try:
        with open_picture(content, name) as picture:
            reduced = _draft(picture, least)
            made = to_picture(picture, background)
            return made._replace(notes=(*made.notes, Note(REDUCED))) if reduced else made
    except UnreadableImage:
        raise
    except image_module.UnidentifiedImageError as error:
        raise UnreadableImage(
            "not an image that Pillow can identify, or in no format that is read"
        ) from error
    except Exception as error:  # PIL and its codecs raise many types on damaged files
        raise UnreadableImage(str(error) or type(error).__name__) from error


def to_picture(picture: Any, background: str | None = "white") -> Picture:
    """A PIL image of any mode → Picture: turned as its EXIF says, over a background, the first frame.

    Transparent pixels are composited over `background` (None: alpha is dropped, as indexes without a
    background were built). 16 bits a channel become 8 by the file's own range: values up to 2^k − 1 for the
    smallest k of 8, 10, 12, 14, 16 are shifted right by k − 8, so that a 12-bit scan in a 16-bit file keeps
    its brightness and scans of one depth keep theirs relative to each other; a full 16-bit range loses its
    low byte. Integers outside 16 bits and float pixels have no known range. A picture of more than
    MOST_PIXELS is reduced, and noted. Raises UnreadableImage.
    """
    if picture.format in RUNS_PROGRAMS:
        raise UnreadableImage(f"{picture.format} is not read: another program would have to draw it")
    first = getattr(picture, "tell", lambda: 0)() == 0
    try:
        channels, alpha, notes = _read_channels(picture)
        if alpha is not None and background is not None and not bool((alpha == 255).all()):
            channels = _composite(channels, alpha, background)
            notes.append(Note(f"transparent, composited over {background}"))
        notes += _later_frames(picture) if first else []
    except UnreadableImage:
        raise
    except Exception as error:  # PIL decodes lazily: a damaged file shows here, in many types
        raise UnreadableImage(str(error) or type(error).__name__) from error
    channels = channels.permute(2, 0, 1)
    if channels[0].numel() > MOST_PIXELS:
        channels, notes = _reduced(channels), [*notes, Note(REDUCED)]
    return Picture(channels.contiguous(), tuple(notes))


def _draft(picture: Any, least: int | None) -> bool:
    """Have a JPEG, not read yet, decoded at a reduced size: to be within MOST_PIXELS (True then), or because
    `least` pixels a side are enough."""
    if picture.format not in ("JPEG", "MPO"):
        return False
    width, height = picture.size
    needed, scale = 1, 8
    while width * height > MOST_PIXELS * needed**2 and needed < 8:
        needed *= 2
    enough = 1 if least is None else min(width, height) // least
    while scale > 1 and (scale > enough or width % scale or height % scale):
        scale //= 2  # where a block is not whole, the picture would be stretched a little
    scale = max(scale, needed)
    if scale > 1:
        picture.draft(picture.mode, (max(width // scale, 1), max(height // scale, 1)))
    return needed > 1


def _reduced(channels: torch.Tensor) -> torch.Tensor:
    """uint8 [3, H, W] by the means of squares of pixels, the smallest that bring it within MOST_PIXELS."""
    step = math.ceil((channels[0].numel() / MOST_PIXELS) ** 0.5)
    planes = [_block_means(plane, step) for plane in channels]
    return torch.stack(planes)


def _block_means(plane: torch.Tensor, step: int) -> torch.Tensor:
    means = torch.nn.functional.avg_pool2d(plane[None].float(), step, ceil_mode=True, count_include_pad=False)
    return means[0].round().to(torch.uint8)


def _read_channels(picture: Any) -> tuple[torch.Tensor, torch.Tensor | None, list[Note]]:
    """uint8 [H, W, 3], alpha uint8 [H, W] where there is any, and what was done to the depth."""
    if picture.mode == "F":
        raise UnreadableImage("mode F (float pixels) has no known range")
    if picture.mode in _DEEP_MODES:
        return _from_depth(*_deep_grey(picture))
    rawmode = _deep_rawmode(picture)
    low = _low_bytes(picture, rawmode)
    if low is not None:
        return _from_depth(*_deep_colour(picture, low, rawmode))
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    picture = picture.convert("LA") if picture.mode == "La" else picture  # La goes nowhere else
    values = _values(upright(picture).convert(mode))
    notes = [Note(HIGH_BYTES)] if rawmode else []
    return values[..., :3], values[..., 3] if mode == "RGBA" else None, notes


def _values(picture: Any) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture))


def _from_depth(
    depth: torch.Tensor, alpha: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, list[Note]]:
    """integers [H, W, 3] in 16 bits → uint8 by the range of its values; alpha as it is."""
    bits = next(bits for bits in DEPTHS if int(depth.max()) < 1 << bits)
    notes = [] if bits == 16 else [Note(f"16 bits a channel with values of {bits} bits, scaled by those")]
    return (depth >> (bits - 8)).to(torch.uint8), alpha, notes


def _deep_grey(picture: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    import numpy as np

    transparent = picture.info.get("transparency")
    picture = upright(picture)
    grey = torch.from_numpy(np.asarray(picture).astype(np.int64))
    if grey.min() < 0 or grey.max() > 65535:
        raise UnreadableImage(f"mode {picture.mode} with values outside 16 bits")
    alpha = (grey != transparent).to(torch.uint8) * 255 if isinstance(transparent, int) else None
    return grey[..., None].expand(*grey.shape, 3), alpha


def _deep_rawmode(picture: Any) -> str:
    """The raw mode of a file of 16-bit colour that Pillow gives as 8 bits, "" for any other picture."""
    tags = getattr(picture, "tag_v2", {})
    if tags.get(PLANAR_TAG) == 2 and max(tags.get(BITS_TAG, (8,))) > 8:
        raise UnreadableImage("a TIFF of more than 8 bits in separate planes, which Pillow garbles")
    for tile in getattr(picture, "tile", ()):
        rawmode, *rest = (tile[3],) if isinstance(tile[3], str) else tile[3] or ("",)
        if isinstance(rawmode, str) and ";16" in rawmode and picture.mode not in _DEEP_MODES:
            return rawmode
        if str(tile[0]).startswith("ppm") and picture.mode == "RGB" and rest and rest[0] == 65535:
            return f"{rawmode};16"
    return ""


def _low_bytes(picture: Any, rawmode: str) -> Any:
    """The same file opened so that Pillow unpacks the low byte of each channel; None where it cannot."""
    file, ending = getattr(picture, "fp", None), rawmode[-4:]
    known = rawmode == "LA;16B" or (ending in _OTHER_BYTE and rawmode[:-4] in ("RGB", "RGBA", "RGBX"))
    if file is None or not known:
        return None
    position = file.tell()
    file.seek(0)
    low = open_picture(file.read())
    file.seek(position)
    other = "RGBA" if rawmode == "LA;16B" else rawmode[:-4] + _OTHER_BYTE[ending]
    low.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
        for tile in low.tile
    ]
    return low


def _deep_colour(picture: Any, low: Any, rawmode: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """16-bit colour out of its high and low bytes: int32 [H, W, 3], and alpha uint8."""
    transparent = picture.info.get("transparency")
    high_bytes, low_bytes = _values(upright(picture)).int(), _values(upright(low)).int()
    if rawmode == "LA;16B":  # unpacked as RGBA, its four bytes are grey high, grey low, alpha high, alpha low
        grey, alpha = low_bytes[..., 0] * 256 + low_bytes[..., 1], low_bytes[..., 2]
        return grey[..., None].expand(*grey.shape, 3), alpha.to(torch.uint8)
    depth = high_bytes * 256 + low_bytes
    if depth.shape[-1] == 4:
        return depth[..., :3], high_bytes[..., 3].to(torch.uint8)
    if isinstance(transparent, tuple):
        return depth, (depth != torch.tensor(transparent)).any(-1).to(torch.uint8) * 255
    return depth, None


def _composite(channels: torch.Tensor, alpha: torch.Tensor, background: str) -> torch.Tensor:
    """uint8 [H, W, 3] with alpha uint8 [H, W] over a colour: exact where alpha is 0 or 255."""
    weight = alpha[..., None].int()
    behind = torch.tensor(_colour(background), dtype=torch.int32)
    return ((channels.int() * weight + behind * (255 - weight) + 127) // 255).to(torch.uint8)


def _later_frames(picture: Any) -> list[Note]:
    try:
        later = getattr(picture, "n_frames", 1) - 1
    except Exception:  # of damaged files, in many types; the first frame has been read
        return [Note(FRAMES_DAMAGED)]
    return [Note(FRAMES, amount=later), Note(FRAME_FILES)] if later > 0 else []


def upright(picture: Any) -> Any:
    """The picture as viewers show it: turned by its EXIF orientation, if it has a legible one."""
    import PIL.ExifTags
    import PIL.ImageOps

    try:
        orientation = picture.getexif().get(PIL.ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF, of which PIL raises many types; damaged pixels show when they are read
        return picture
    return picture if orientation == 1 else PIL.ImageOps.exif_transpose(picture)
