"""Stage 2b: the pool's scaled latents in chunks like the pictures', once for each autoencoder's encoder.

python recipes/emoji/latents.py --seed 1
"""

import argparse

import numpy as np
import torch
from common import DEVICE, MODEL, STATE, fingerprint, to_float
from diffusers import AutoencoderKL
from pool import CHUNK, Pool, chunk_path


def mark_of(vae: AutoencoderKL) -> str:
    """Tells encoders apart; the decoder may learn on."""
    first = float(next(vae.encoder.parameters()).detach().double().abs().sum())
    return fingerprint(encoder=f"{first:.9f}", scale=vae.config.scaling_factor)


def latents_of(seed: int) -> np.ndarray:
    """What is there of them: float16 (N, 4, 16, 16), N a multiple of 2,000."""
    mark = mark_of(AutoencoderKL.from_pretrained(MODEL / "vae").float())
    found = []
    while (path := STATE / "latents" / f"{mark}-{seed}-{len(found):03}.npy").exists():
        found.append(np.load(path))
    if not found:
        raise SystemExit(
            f"no latents of seed {seed} for this autoencoder: run latents.py --seed {seed} first"
        )
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vae = (
        AutoencoderKL.from_pretrained(MODEL / "vae")
        .float()
        .eval()
        .to(DEVICE, memory_format=torch.channels_last)
    )
    mark, number = mark_of(vae), 0
    folder = STATE / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    while chunk_path(args.seed, number).exists():
        path = folder / f"{mark}-{args.seed}-{number:03}.npy"
        if not path.exists():
            new, pool = [], Pool(args.seed)
            with torch.inference_mode():
                for i in range(number * CHUNK, (number + 1) * CHUNK, 20):
                    x = to_float(torch.from_numpy(pool.pictures(list(range(i, i + 20)))))
                    x = x.contiguous(memory_format=torch.channels_last)
                    new.append(
                        (vae.encode(x).latent_dist.mode() * vae.config.scaling_factor).half().cpu().numpy()
                    )
            np.save(part := path.with_suffix(".part.npy"), np.concatenate(new))
            part.replace(path)
            print(path.name, flush=True)
        number += 1


if __name__ == "__main__":
    main()
