"""What a picture of ours says about itself: XMP in a PNG's text chunk.

The mark holds the IPTC digital source type for media made by a trained model, what is
needed to make the picture again, and the SHA-256 of its pixels. It never holds the
identity it was made from: faces are personal data.
"""

from __future__ import annotations

import html
import io
import math
import mmap
import re
import struct
import zlib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError
from .files import open_plain

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media made by a trained model; a name, not a page to fetch."""
COMPOSITE = (
    "http://cv.iptc.org/newscodes/digitalsourcetype/"
    "compositeWithTrainedAlgorithmicMedia"
)
"""IPTC's term for such media put together with other pictures."""
NAMESPACE = "urn:id3pm-deploy:1.0#"
"""Our own XMP properties."""

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_XMP = "http://ns.adobe.com/xap/1.0/"
KEYWORD = "XML:com.adobe.xmp"
"""Of the PNG text chunk that holds the packet."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BEGIN, _END = b"<?xpacket begin=", b"<?xpacket end="
_DIGEST = "pixels_sha256"
_TOOL = "id3pm-deploy"
_TEXTS = (
    "tool_version",
    "solver",
    "backend",
    "precision",
    "checkpoint",
    "guidance_schedule",
    "sr_solver",
    "sr_backend",
    "sr_precision",
    "sr_checkpoint",
)
_COUNTS = ("seed", "sample", "steps", "sr_steps")
_PLAIN_NUMBERS = ("guidance", "guidance_rescale", "sr_guidance")
_LONGEST_TEXT = 200
_LARGEST_PACKET = 1 << 16


def _clean(text: str) -> str:
    """``text`` as XML 1.0 can hold it, on one line, at most 200 characters."""
    line = "".join(" " if c in "\t\n\r" else c for c in text)
    bad = "[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    return re.sub(bad, "\ufffd", line)[:_LONGEST_TEXT].strip()


@dataclass(frozen=True)
class PictureMark:
    """How a picture was made, and that it was made; written into its PNG.

    ``sample`` is None on a sheet of several samples; ``composite`` says that a photo is
    on it as well. ``checkpoint`` is a title, never a path. What begins with ``sr_``
    says how a second model enlarged the picture. Of a list of guidance scales the
    largest is kept, and ``listed`` as the schedule. What has a default and is at it
    is not written. Text is reduced to one line of at most 200 characters that XML can
    hold.

    Raises:
        InputError: The seed or the sample is negative, there is less than one step, or
            a number of the guidance is not finite.
    """

    tool_version: str
    seed: int
    sample: int | None
    solver: str
    steps: int
    guidance: float
    backend: str
    precision: str
    checkpoint: str = ""
    guidance_schedule: str = "constant"
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    composite: bool = False
    sr_solver: str = ""
    sr_steps: int = 0
    sr_guidance: float = 1.0
    sr_backend: str = ""
    sr_precision: str = ""
    sr_checkpoint: str = ""

    def __post_init__(self) -> None:
        for name in _TEXTS:
            object.__setattr__(self, name, _clean(getattr(self, name)))
        guidance = (
            self.guidance,
            self.guidance_rescale,
            self.sr_guidance,
            *(self.guidance_interval or ()),
        )
        numbers = (self.seed, self.sample or 0, self.steps - 1, self.sr_steps)
        if min(numbers) < 0 or not all(map(math.isfinite, guidance)):
            raise InputError(
                "a picture's mark has a number that is out of range",
                why=f"seed {self.seed}, sample {self.sample}, steps {self.steps}, "
                f"guidance {guidance}",
            )


def xmp_packet(mark: PictureMark, pixels_sha256: str = "") -> str:
    """The XMP packet, as text, that says what ``mark`` says, and of which pixels."""
    source = COMPOSITE if mark.composite else GENERATED
    version = html.escape(mark.tool_version, quote=False)
    text = _text_from_mark(mark)
    if pixels_sha256:
        text[_DIGEST] = pixels_sha256
    ours = "".join(
        f"   <id3pm:{key}>{html.escape(value, quote=False)}</id3pm:{key}>\n"
        for key, value in text.items()
    )
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        f' <rdf:RDF xmlns:rdf="{_RDF}">\n'
        f'  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{_IPTC}"'
        f' xmlns:xmp="{_XMP}" xmlns:id3pm="{NAMESPACE}">\n'
        "   <Iptc4xmpExt:DigitalSourceType>"
        f"{source}</Iptc4xmpExt:DigitalSourceType>\n"
        f"   <xmp:CreatorTool>{_TOOL} {version}</xmp:CreatorTool>\n"
        f"{ours}"
        "  </rdf:Description>\n </rdf:RDF>\n</x:xmpmeta>\n"
        '<?xpacket end="r"?>'
    )


def _text_from_mark(mark: PictureMark) -> dict[str, str]:
    """Our own properties by name; those that may be left out only where they say
    something."""
    text = {}
    for item in fields(mark):
        value = getattr(mark, item.name)
        if item.name == "composite" or value is None or value == item.default:
            continue
        pair = isinstance(value, tuple)
        text[item.name] = " ".join(map(str, value)) if pair else str(value)
    return text


def read_mark(path: Path) -> PictureMark:
    """What a PNG of ours says about itself; the picture is not decoded.

    Raises:
        InputError: The file cannot be read, is no PNG, or has no mark or a bad one.
    """
    try:
        with open(path, "rb") as handle:
            packet = _find_packet(handle)
        return _parse_packet(packet)
    except OSError as error:
        raise InputError(f"cannot read {path}", why=str(error.strerror)) from error
    except (ValueError, struct.error, SyntaxError) as error:  # ParseError is the last
        raise InputError(
            f"{path} is not a marked picture",
            why=str(error),
            fix="give a PNG that id3pm-deploy wrote, unchanged",
        ) from error


def find_mark(path: Path) -> tuple[PictureMark, str]:
    """The mark in a picture file of any format, and the SHA-256 of its pixels.

    In a PNG it is looked for where this tool puts it, in any other file wherever the
    header and trailer of an XMP packet stand (XMP part 3, "packet scanning").

    Returns:
        The mark, and the SHA-256, empty where an earlier version wrote the mark.

    Raises:
        ValueError: It has no mark, or a bad one; the message is one clause.
        OSError: It cannot be read, or is no plain file.
    """
    try:
        with open_plain(path, follow=True) as handle:
            png = handle.read(len(_SIGNATURE)) == _SIGNATURE
            handle.seek(0)
            packet = _find_packet(handle) if png else _scan_for_packet(handle)
        ours, composite = _properties(packet)
        return _mark_from_text(ours, composite=composite), ours.get(_DIGEST, "")
    except (struct.error, SyntaxError) as error:
        raise ValueError(str(error)) from error


def _scan_for_packet(handle: BinaryIO) -> str:
    """The text of the first XMP packet in any file. Raises ValueError."""
    if not handle.seek(0, io.SEEK_END):
        raise ValueError("it is empty")
    with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = data.find(_BEGIN)
        end = data.find(_END, begin, begin + _LARGEST_PACKET) if begin >= 0 else -1
        if end < 0:
            raise ValueError("it has no XMP")
        return data[begin:end].decode("utf-8")


def _find_packet(handle: BinaryIO) -> str:
    """The text of the XMP chunk. Raises ValueError where there is none."""
    if handle.read(8) != _SIGNATURE:
        raise ValueError("it is no PNG file")
    while len(head := handle.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind != b"iTXt":
            handle.seek(length + 4, io.SEEK_CUR)
            continue
        if length > _LARGEST_PACKET:
            raise ValueError("its text is longer than any mark of ours")
        data, checksum = handle.read(length), handle.read(4)
        if checksum != struct.pack(">I", zlib.crc32(kind + data)):
            raise ValueError("its text is damaged")
        keyword, _, rest = data.partition(b"\0")
        if keyword == KEYWORD.encode():
            if rest[:4] != b"\0\0\0\0":
                raise ValueError("its XMP is compressed or in a language")
            return rest[4:].decode("utf-8")
    raise ValueError("it has no XMP")


def _parse_packet(packet: str) -> PictureMark:
    """The mark in an XMP packet. Raises ValueError or ParseError."""
    ours, composite = _properties(packet)
    return _mark_from_text(ours, composite=composite)


def _properties(packet: str) -> tuple[dict[str, str], bool]:
    """Our own properties in an XMP packet that calls a picture generated, and whether
    it calls it a composite. Raises ValueError or ParseError."""
    import xml.etree.ElementTree as ET  # writing a mark, as sampling does, needs none

    if "<!" in packet:  # before any parser: no DOCTYPE, so no entities
        raise ValueError("its XMP has a declaration, which XMP does not need")
    found: dict[str, str] = {}
    root = ET.fromstring(packet)  # noqa: S314 - small, and without entities
    for description in root.iter(f"{{{_RDF}}}Description"):
        properties = [(str(key), value) for key, value in description.items()]
        properties += [(child.tag, child.text or "") for child in description]
        for key, value in properties:
            if found.setdefault(key, value) != value:
                raise ValueError("its XMP says two things at once")
    source = found.get(f"{{{_IPTC}}}DigitalSourceType")
    if source not in (GENERATED, COMPOSITE):
        raise ValueError("its XMP does not call it generated")
    prefix = f"{{{NAMESPACE}}}"
    ours = {k[len(prefix) :]: v for k, v in found.items() if k.startswith(prefix)}
    return ours, source == COMPOSITE


def _mark_from_text(text: dict[str, str], *, composite: bool) -> PictureMark:
    """A mark from its properties; unknown ones are left to later versions."""
    known: dict[str, Any] = {"composite": composite, "sample": None}
    for item in fields(PictureMark):
        if item.name in text and item.name != "composite":
            known[item.name] = _value_from_text(item.name, text[item.name].strip())
        elif item.default is MISSING and item.name not in known:
            raise ValueError(f"its XMP lacks {item.name}")
    try:
        return PictureMark(**known)
    except InputError as error:
        raise ValueError(error.what) from error


def _value_from_text(name: str, value: str) -> Any:
    if name in _COUNTS:
        if not re.fullmatch("[0-9]{1,39}", value):
            raise ValueError(f"its {name} is no whole number")
        return int(value)
    if name == "guidance_interval":
        if len(ends := value.split()) != 2:
            raise ValueError(f"its {name} is not two numbers")
        return float(ends[0]), float(ends[1])
    return float(value) if name in _PLAIN_NUMBERS else value
