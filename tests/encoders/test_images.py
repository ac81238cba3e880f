"""The one door for pixels: every row of bad or unusual input, as the picture its author saw or one error."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from imprompt.encoders.images import Budget, content_hash, frame_count, load_frames, load_image, load_mask
from imprompt.encoders.masks import mask_tensor
from imprompt.encoders.video import read_video
from imprompt.errors import InputError
from imprompt.output import read_record
from imprompt.output.clips import encode_clip


def _picture(width: int = 40, height: int = 30) -> Image.Image:
    """Smooth, so that lossy formats keep it, and different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 60)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def _encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _distance(first: Image.Image, second: Image.Image) -> float:
    assert first.size == second.size
    return float(np.abs(np.asarray(first, dtype=float) - np.asarray(second, dtype=float)).mean())


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_common_formats_come_back_as_rgb_of_the_same_picture(format: str) -> None:
    image = load_image(_encoded(_picture(), format))
    assert image.mode == "RGB"
    assert _distance(image, _picture()) < (25 if format == "GIF" else 3)


def test_path_bytes_and_pil_image_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    _picture().save(path)
    hashes = {content_hash(load_image(source)) for source in (path, str(path), path.read_bytes(), _picture())}
    assert len(hashes) == 1


def test_content_hash_tells_pixels_and_size_apart() -> None:
    assert content_hash(Image.new("RGB", (2, 8))) != content_hash(Image.new("RGB", (8, 2)))
    assert content_hash(Image.new("RGB", (2, 2))) != content_hash(Image.new("RGB", (2, 2), (0, 0, 1)))


def test_given_pil_image_is_left_as_it_was() -> None:
    given = _picture()
    load_image(given).putpixel((0, 0), (9, 9, 9))
    assert given.getpixel((0, 0)) == (0, 0, 60)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file '.*none\.png'"):
        load_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="is a folder; a file is expected"):
        load_image(tmp_path)


def test_file_without_permission_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_encoded(_picture(), "PNG"))

    def refuse(*_: object, **__: object) -> None:  # the tests may run as root, whom no mode bits stop
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        load_image(path)


@pytest.mark.parametrize(
    "data", [b"", b"hello, I am text", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_picture_is_an_input_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(InputError):
        load_image(path)


def test_other_types_are_an_input_error() -> None:
    with pytest.raises(InputError, match="got a int"):
        load_image(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_truncated_picture_is_an_input_error(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = _encoded(noise, format)
    with pytest.raises(InputError, match=r"truncated|no picture"):
        load_image(data[: len(data) * 2 // 3])


def test_size_is_refused_from_the_header_before_decoding() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (13_000, 60_000):  # the second is past Pillow's own limit
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        with pytest.raises(InputError, match="at most 67 million"):
            load_image(bomb + chunk(b"IEND", b""))


def test_pixel_cap_can_be_set() -> None:
    with pytest.raises(InputError, match="40×30"):
        load_image(_picture(), max_pixels=1199)
    assert load_image(_picture(), max_pixels=1200).size == (40, 30)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = load_image(_encoded(Image.fromarray(ramp), format))
    expected = np.rint(ramp / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(image)[..., 0], expected)


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_tiff_is_scaled_from_its_range(top: float) -> None:
    ramp = (np.linspace(0, 1, 64) * top).astype(np.float32).reshape(8, 8)
    image = load_image(_encoded(Image.fromarray(ramp), "TIFF"))
    assert np.abs(np.asarray(image)[..., 1] - np.linspace(0, 255, 64).reshape(8, 8)).max() <= 0.51


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 1e6])
def test_float_values_without_a_meaning_are_an_input_error(bad: float) -> None:
    values = np.full((4, 4), 0.5, dtype=np.float32)
    values[1, 1] = bad
    with pytest.raises(InputError, match=r"NaN|values from"):
        load_image(_encoded(Image.fromarray(values), "TIFF"))


def test_cmyk_jpeg_keeps_its_colours() -> None:
    image = load_image(_encoded(_picture().convert("CMYK"), "JPEG", quality=95))
    assert _distance(image, _picture()) < 4


def test_embedded_colour_profile_becomes_srgb() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = load_image(_encoded(_picture(), "PNG", icc_profile=lab))
    assert _distance(same, _picture()) < 1
    broken = load_image(_encoded(_picture(), "PNG", icc_profile=b"no profile at all"))
    assert _distance(broken, _picture()) == 0


def test_palette_and_palette_transparency() -> None:
    palette = _picture().quantize(16)
    assert _distance(load_image(_encoded(palette, "PNG")), palette.convert("RGB")) == 0
    flat = Image.new("P", (4, 4), 0)
    flat.putpalette([200, 0, 0, 0, 200, 0])
    flat.putpixel((1, 1), 1)
    image = load_image(_encoded(flat, "PNG", transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (0, 200, 0)


def test_colours_hidden_under_transparency_do_not_leak() -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    hidden.putpixel((2, 2), (0, 0, 255, 255))
    hidden.putpixel((3, 3), (0, 0, 0, 128))
    image = load_image(_encoded(hidden, "PNG"))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((2, 2)) == (0, 0, 255)
    assert abs(image.getpixel((3, 3))[0] - 127) <= 1
    assert load_image(hidden, background=(0, 255, 0)).getpixel((0, 0)) == (0, 255, 0)


@pytest.mark.parametrize(
    ("mode", "pixel", "transparency"), [("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("I;16", 700, 700)]
)
def test_a_colour_named_transparent_becomes_background(
    mode: str, pixel: object, transparency: object
) -> None:
    image = Image.new(mode, (3, 3), pixel)  # type: ignore[arg-type]
    image.info["transparency"] = transparency
    assert load_image(image).getpixel((0, 0)) == (255, 255, 255)


def test_grey_with_alpha_and_bilevel() -> None:
    grey = Image.new("LA", (2, 2), (10, 0))
    assert load_image(grey).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_pictures_and_masks(format: str, orientation: int) -> None:
    """The stored picture is the upright one moved by the inverse of what the tag asks for."""
    upright = _picture()
    inverse = {
        1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270",
    }[orientation]  # fmt: skip
    stored = upright.transpose(Image.Transpose[inverse]) if inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encoded(stored, format, exif=exif)
    assert _distance(load_image(data), upright) < 3
    assert _distance(load_mask(data), upright.convert("L")) < 3
    assert 0x0112 not in load_image(data).getexif()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_transparent_parts_of_a_mask_are_outside() -> None:
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    mask.putpixel((1, 0), (255, 255, 255, 255))
    grey = load_mask(mask)
    assert (grey.mode, grey.getpixel((0, 0)), grey.getpixel((1, 0))) == ("L", 0, 255)


def test_sixteen_bit_mask_is_scaled() -> None:
    mask = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(load_mask(_encoded(mask, "PNG"))).tolist() == [[0, 128, 255]]


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of version 2 for grey with a gamma, written by hand: Pillow makes none."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(12 + 67)
    text = b"text" + bytes(4) + b"none"
    tags = {b"desc": name, b"cprt": text, b"wtpt": white, b"kTRC": curve}
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header += (
        struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
        + b"acsp"
        + bytes(28)
        + struct.pack(">iii", 63190, 65536, 54061)
    )
    return header.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_the_colour_profile_of_a_grey_picture_is_honoured(mode: str) -> None:
    """Grey of gamma 1 holds amounts of light: half of it is 188 in sRGB, not 128."""
    full = 65535 if mode == "I;16" else 255
    image = (
        Image.new("L", (4, 4), 128).convert(mode) if mode != "I;16" else Image.new(mode, (4, 4), full // 2)
    )
    linear = load_image(_encoded(image, "PNG", icc_profile=grey_profile(1.0)))
    assert abs(linear.getpixel((0, 0))[0] - 188) <= 1
    plain = load_image(_encoded(image, "PNG", icc_profile=grey_profile(2.2)))
    assert abs(plain.getpixel((0, 0))[0] - 128) <= 4


def test_a_profile_of_other_colours_than_the_picture_is_ignored() -> None:
    image = load_image(_encoded(_picture(), "PNG", icc_profile=grey_profile(1.0)))
    assert _distance(image, _picture()) == 0


def test_bad_names_are_one_line() -> None:
    for name in ("x" * 300 + ".png", "a\0.png", "~nouser/x.png", "\ud800.png", "", "/proc/1/mem/x.png"):
        for read in (load_image, load_mask, load_frames, read_video):
            with pytest.raises(InputError) as caught:
                read(name)
            assert str(caught.value).isprintable()
        assert frame_count(name) == 1


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for name in (tmp_path / "a.png", Path("/dev/zero")):
        for read in (load_image, load_mask, load_frames, read_video):
            with pytest.raises(InputError, match="pipe or a device"):
                read(name)


def test_all_pictures_of_a_request_share_one_budget(tmp_path: Path) -> None:
    _picture().save(tmp_path / "a.png")
    frames = [_picture(), _picture().rotate(180)] * 2
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=80)
    one = 3 * 40 * 30
    budget = Budget(6 * one)
    load_image(tmp_path / "a.png", budget=budget)
    assert len(load_frames(tmp_path / "a.gif", budget=budget)[0]) == 4
    load_mask(tmp_path / "a.png", budget=budget)
    with pytest.raises(InputError, match=r"a\.png.*once decoded"):
        load_image(tmp_path / "a.png", budget=budget)
    for source in (tmp_path, tmp_path / "a.gif"):
        with pytest.raises(InputError, match="once decoded"):
            load_frames(source, budget=Budget(one - 1))


def numbers(values: list[list[int]], mode: str) -> Image.Image:
    kind = {"L": np.uint8, "I;16": np.uint16, "I": np.int32}[mode]
    return Image.fromarray(np.array(values, dtype=kind))


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "LA", "RGBA", "P"])
def test_a_mask_of_zeros_and_ones_is_read_as_black_and_white(mode: str, tmp_path: Path) -> None:
    values = [[0, 1, 0], [1, 1, 0]]
    image = numbers(values, "I;16") if mode == "I;16" else numbers(values, "L").convert(mode)
    notes: list[str] = []
    mask = load_mask(_encoded(image, "PNG"), notes=notes)
    assert (np.asarray(mask) == 255 * np.array(values)).all()
    assert len(notes) == 1
    assert "0 and 1" in notes[0]


def test_other_masks_are_left_as_they_are() -> None:
    for values in ([[0, 2]], [[0, 255]], [[0, 0]], [[1, 2]]):
        notes: list[str] = []
        assert np.asarray(load_mask(_encoded(numbers(values, "L"), "PNG"), notes=notes)).tolist() == values
        assert notes == []


def test_numbers_of_every_type_mean_the_same_mask() -> None:
    steps = np.array([[0, 51, 255], [102, 0, 255]])
    expected = torch.tensor(steps / 255, dtype=torch.float32)
    for kind in (np.uint8, np.int16, np.int32, np.int64, np.uint16):
        assert torch.allclose(mask_tensor(steps.astype(kind)), expected)
    for kind in (torch.uint8, torch.int16, torch.int32, torch.int64):
        assert torch.allclose(mask_tensor(torch.tensor(steps).to(kind)), expected)
        assert torch.allclose(mask_tensor(torch.tensor(steps).to(kind)[None, None]), expected)
    for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert torch.allclose(mask_tensor(torch.tensor(steps / 255).to(kind)), expected, atol=3e-3)
    assert torch.allclose(mask_tensor(numbers(steps.tolist(), "L")), expected)
    halves = torch.tensor([[0, 1], [1, 0]])
    for kind in (torch.uint8, torch.int64, torch.bool, torch.float32):
        assert torch.equal(mask_tensor(halves.to(kind)), halves.float())
    notes: list[str] = []
    assert torch.equal(mask_tensor(halves.to(torch.uint8), notes), halves.float())
    assert torch.equal(mask_tensor(numbers(halves.tolist(), "L"), notes), halves.float())
    assert len(notes) == 2


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 3, 4), torch.zeros(3), torch.zeros(0, 3), torch.full((2, 2), 2.0),
        torch.full((2, 2), -1), torch.full((2, 2), 256), torch.full((2, 2), torch.nan),
        torch.zeros(2, 2, dtype=torch.complex64), np.array([["a"]]), torch.full((2, 2), torch.inf),
    ],
)  # fmt: skip
def test_what_is_no_mask_is_an_input_error(mask: object) -> None:
    with pytest.raises(InputError, match="mask"):
        mask_tensor(mask)  # type: ignore[arg-type]


def test_500_damaged_pictures_are_one_line_or_a_picture(tmp_path: Path) -> None:
    """Bytes are flipped, cut out, doubled and appended, in every format, headers above all."""
    random = np.random.default_rng(0)
    frames = [_picture(), _picture().rotate(180)]
    moving = {"save_all": True, "append_images": frames[1:]}
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a text"
    sound = [
        *(_encoded(_picture(), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "ICO")),
        *(_encoded(_picture(), kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP", "TIFF")),
        *(_encoded(_picture(), kind, **moving) for kind in ("GIF", "WEBP", "PNG")),
        _encoded(_picture().quantize(8), "PNG", transparency=0),
        _encoded(_picture().convert("LA"), "PNG", icc_profile=grey_profile(1.0)),
        _encoded(_picture().convert("CMYK"), "JPEG"),
        _encoded(_picture().convert("F"), "TIFF"),
        _encoded(_picture(), "JPEG2000"),
    ]
    messages = []
    for number in range(500):
        data = bytearray(sound[number % len(sound)])
        for _ in range(int(random.integers(1, 6))):
            at = int(random.integers(min(len(data), 200 if random.random() < 0.6 else len(data))))
            match int(random.integers(5)):
                case 0:
                    data[at] ^= 1 << int(random.integers(8))
                case 1:
                    data[at : at + 4] = random.bytes(4)
                case 2:
                    data[at : at + 4] = b"\xff\xff\xff\xff"
                case 3:
                    del data[at : at + int(random.integers(1, 40))]
                case 4:
                    data[at:at] = data[at : at + 30]
            if len(data) < 2:
                break
        path = tmp_path / "a.png"
        path.write_bytes(data)
        for read in (load_image, load_mask, load_frames, read_record):
            try:
                read(path)  # type: ignore[operator]
            except InputError as error:
                messages.append(str(error))
        assert frame_count(path) >= 1
    assert all(message.isprintable() for message in messages)
    assert 500 < len(messages) < 2000


def coloured(*numbers: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (40 * number, 90, 200 - 40 * number)) for number in numbers]


def numbers_of(frames: list[Image.Image]) -> list[int]:
    return [round(np.asarray(frame)[0, 0, 0] / 40) for frame in frames]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_frames_that_are_shown_longer_are_repeated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    first, *others = coloured(0, 1, 2)
    lossless = {"lossless": True} if suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=[100, 300, 200], **lossless)
    frames, fps = load_frames(path)
    assert (numbers_of(frames), fps) == ([0, 1, 1, 1, 2, 2], 10)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("fps", [7, 8, 12, 24, 30])
def test_equal_frames_that_were_merged_are_read_back(tmp_path: Path, suffix: str, fps: float) -> None:
    path, numbers = tmp_path / f"a{suffix}", [0, 0, 1, 2, 2, 2, 3, 1, 1]
    encoded = encode_clip(coloured(*numbers), suffix, fps, "{}")
    assert isinstance(encoded, bytes)
    path.write_bytes(encoded)
    frames, read = load_frames(path)
    assert numbers_of(frames) == numbers
    assert read == pytest.approx(fps, rel=0.03)
