#!/usr/bin/env bash
# Library: pillow==13.0.0
# Guess: Image.open(path).convert("RGB"), what loaders of vision-language models do with every picture, shows the picture:
# of a grey PNG of 16 bits, 32768 of 65535 becomes a middle grey, 128 of 255.
# Seen: every value above 255 becomes 255, without a warning. A depth map, an X-ray or a scan of 16 bits turns white; the
# same values in a PNG of 16-bit RGB are scaled.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy
"$work/venv/bin/python" - "$work" <<'EOF'
import struct
import sys
import zlib

from PIL import Image


def png(path: str, kind: int, samples: list[int]) -> None:
    """Write one row of 16-bit samples (kind 0: grey, 2: RGB)."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = len(samples) // (3 if kind == 2 else 1)
    row = b"\0" + b"".join(struct.pack(">H", sample) for sample in samples)
    head = struct.pack(">IIBBBBB", width, 1, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + body)


values = [0, 1000, 32768, 65535]
png(f"{sys.argv[1]}/grey.png", 0, values)
png(f"{sys.argv[1]}/colour.png", 2, [value for value in values for _ in range(3)])
shown = {}
for name in ("grey", "colour"):
    image = Image.open(f"{sys.argv[1]}/{name}.png").convert("RGB")
    shown[name] = [image.getpixel((x, 0))[0] for x in range(len(values))]
print("as 8 bits it would be ", [round(value / 257) for value in values])
print("grey of 16 bits:      ", shown["grey"])
print("the same in RGB:      ", shown["colour"])
sys.exit(0 if shown["grey"] == [0, 255, 255, 255] and shown["colour"][2] in (127, 128) else 1)
EOF
echo "still so"
