"""The features stage: what an encoder that nothing has trained makes of every picture, once for all that sees it so."""

from __future__ import annotations

import numpy as np
import torch

from jobs.models.vision.encoder import first_encoder
from jobs.node.context import StageContext
from orchestrator.spec.work import FeaturesWork

# Pictures of one pass: it decides rounding, and so is part of what the artifact is.
BATCH = 8


@torch.no_grad()
def run(context: StageContext, work: FeaturesWork) -> None:
    """Commit `features.npy`, one row a picture of the tokens artifact."""
    encoder = first_encoder(work.encoder, work.seed).eval()
    pixels = np.load(context.fetch(work.tokens, "pixels.npy"), mmap_mode="r", allow_pickle=False)
    path = context.scratch / "features.npy"
    shape = (len(pixels), work.encoder.patches, work.encoder.hidden_size)
    made = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for first in range(0, len(pixels), BATCH):
        context.check()
        found, _ = encoder(torch.from_numpy(np.array(pixels[first : first + BATCH])))
        made[first : first + BATCH] = found.numpy()
    made.flush()
    context.commit(work, blobs={path.name: path}, info={"pictures": len(pixels)})
