"""Trains `glyphs`, the bundled backbone: a small ViT trained on letters, without digits.

The training data are glyphs of freely licensed fonts only (the Debian packages in glyphs_fonts.txt, all from Debian's
"main"), with random augmentation: affine, stroke width, blur, resolution, colours, noise. Run:

    apt-get install --no-install-recommends $(cat scripts/glyphs_fonts.txt)
    python scripts/train_glyphs.py --out addenda/backbones/glyphs.safetensors --report scripts/glyphs_report.json

The same seed, fonts, library versions and thread count give the same file. Takes about 85 minutes on one busy core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

from addenda.backbones.loader import glyphs_architecture

# One letter per shape: lower-case letters that look like small capitals are left out, and so are Greek and Cyrillic
# letters that look Latin.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijlmnqrtuyΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσφψωБДЖЗИЛУЦЧШЩЪЫЭЮЯбвдж"
BANK_PX = 48
IMAGE_PX = 32


def draw_bank(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, str]]:
    """Draws each letter of each font once.

    Returns:
        Masks, uint8 [N, BANK_PX, BANK_PX]; letter indices, int64 [N]; font indices, int64 [N]; and the sha256 of each
        font file, by name.
    """
    masks, letters, fonts, digests = [], [], [], {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".ttf", ".otf"}):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest in digests.values():
            continue
        covered = TTFont(path, lazy=True).getBestCmap() or {}
        font = ImageFont.truetype(str(path), 64)
        drawn = 0
        for index, letter in enumerate(LETTERS):
            if ord(letter) not in covered:
                continue
            left, top, right, bottom = font.getbbox(letter)
            size = max(right - left, bottom - top)
            if not 8 <= size <= 256:
                continue
            canvas = Image.new("L", (size, size))
            at = ((size - right + left) / 2 - left, (size - bottom + top) / 2 - top)
            ImageDraw.Draw(canvas).text(at, letter, fill=255, font=font)
            glyph = canvas.resize((BANK_PX - 8, BANK_PX - 8), Image.Resampling.BOX)
            if np.asarray(glyph).max() < 64:
                continue
            framed = Image.new("L", (BANK_PX, BANK_PX))
            framed.paste(glyph, (4, 4))
            masks.append(np.asarray(framed))
            letters.append(index)
            fonts.append(len(digests))
            drawn += 1
        if drawn:
            digests[path.name] = digest
    return torch.from_numpy(np.stack(masks)), torch.tensor(letters), torch.tensor(fonts), digests


def augment(masks: torch.Tensor, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """Augments and colours glyphs: uint8 [B, BANK_PX, BANK_PX] -> float [B, 3, IMAGE_PX, IMAGE_PX].

    A strength below 1 reduces the geometric changes, the share of low resolutions and the noise.
    """
    count = len(masks)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    x = masks.float().div(255).unsqueeze(1)
    # Stroke width: a third thicker, a third thinner.
    stroke = uniform(0, 1, 1, 1, 1)
    thick, thin = F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 3, 1, 1)
    x = torch.where(stroke < 1 / 3, thick, torch.where(stroke < 2 / 3, (thin + x) / 2, x))
    # An affine transform and a smooth local warp.
    angle, shear = strength * uniform(-0.35, 0.35), strength * uniform(-0.3, 0.3)
    zoom_x, zoom_y = 1 + strength * uniform(-0.15, 0.6), 1 + strength * uniform(-0.15, 0.4)
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack(
        [
            torch.stack([cos * zoom_x, (shear - sin) * zoom_y, strength * uniform(-0.2, 0.2)], -1),
            torch.stack([sin * zoom_x, cos * zoom_y, strength * uniform(-0.2, 0.2)], -1),
        ],
        1,
    )
    grid = F.affine_grid(affine, [count, 1, IMAGE_PX, IMAGE_PX], align_corners=False)
    warp = F.interpolate(uniform(-0.12, 0.12, 2, 5, 5), size=IMAGE_PX, mode="bicubic", align_corners=True)
    x = F.grid_sample(x, grid + strength * warp.permute(0, 2, 3, 1), align_corners=False)
    # Resolution: three in five are downsampled and upsampled.
    coarse = torch.randint(0, 5, (count,), generator=generator)
    coarse[uniform(0, 1) > strength] = 4
    for choice, size in ((0, 8), (1, 12), (2, 18)):
        rows = coarse == choice
        small = F.interpolate(x[rows], size=size, mode="area" if size == 8 else "bilinear", antialias=size != 8)
        x[rows] = F.interpolate(small, size=IMAGE_PX, mode="bicubic").clamp(0, 1)
    # Ink and paper colours that differ by at least 0.35 in brightness, half of them grey; then noise.
    paper, ink = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    grey = uniform(0, 1, 1, 1, 1) < 0.5
    paper, ink = (torch.where(grey, c.mean(1, keepdim=True), c) for c in (paper, ink))
    gap = ink.mean((1, 2, 3), keepdim=True) - paper.mean((1, 2, 3), keepdim=True)
    low = gap.abs() < 0.35
    dark_first = uniform(0, 1, 1, 1, 1) < 0.5
    paper = torch.where(low, torch.where(dark_first, paper * 0.2, 1 - paper * 0.2), paper)
    ink = torch.where(low, torch.where(dark_first, 1 - ink * 0.2, ink * 0.2), ink)
    image = paper + x * (ink - paper)
    noise = torch.randn(image.shape, generator=generator) * strength * uniform(0, 0.12, 1, 1, 1)
    return ((image + noise).clamp(0, 1) - 0.5) / 0.5


def main() -> None:
    """Draws the glyphs, trains, and writes the fp16 weights and a report on data and accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=2203)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    masks, letters, fonts, digests = draw_bank(arguments.fonts)
    held_out = fonts % 10 == 0
    train, test = (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)
    print(f"{len(masks)} glyphs, {len(LETTERS)} letters, {len(digests)} fonts; {len(test)} glyphs held out", flush=True)

    model = glyphs_architecture(num_classes=len(LETTERS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, arguments.steps, pct_start=0.05)
    start = time.monotonic()
    for step in range(arguments.steps):
        rows = train[torch.randint(len(train), (arguments.batch,), generator=generator)]
        # A curriculum: at full strength from the start, a ViT this small stays on the initial plateau for long.
        images = augment(masks[rows], generator, strength=min(1.0, 0.1 + step / (0.4 * arguments.steps)))
        loss = F.cross_entropy(model(images), letters[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True)

    model.half().float().eval()  # evaluate the stored precision
    with torch.no_grad():
        hits = torch.cat(
            [(model(augment(masks[rows], generator)).argmax(1) == letters[rows]) for rows in test.split(256)]
        )
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, arguments.out)
    report = {
        "letters": LETTERS,
        "held_out_fonts_top1": round(hits.float().mean().item(), 4),
        "held_out_glyphs": len(test),
        "glyphs": len(masks),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "torch": torch.__version__,
        "weights_sha256": hashlib.sha256(arguments.out.read_bytes()).hexdigest(),
        "fonts_sha256": digests,
    }
    arguments.report.write_text(json.dumps(report, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "fonts_sha256"}, ensure_ascii=False))


if __name__ == "__main__":
    main()
