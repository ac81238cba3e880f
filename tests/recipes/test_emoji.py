"""The emoji recipe: draws follow from (seed, index) alone, captions say what was drawn, a loop resumes."""

import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from imprompt.training.data import Plan

RECIPE = Path(__file__).parents[2] / "recipes" / "emoji"
cv2 = pytest.importorskip("cv2")
pytest.importorskip("resvg_py")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The recipe's modules with an empty state folder of their own."""
    monkeypatch.setenv("EMOJI_STATE", str(tmp_path))
    monkeypatch.syspath_prepend(str(RECIPE))
    names = [path.stem for path in RECIPE.glob("*.py")]
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


class Icons:
    """Two words and two wordless icons: discs of one colour on nothing."""

    def __init__(self) -> None:
        y, x = np.mgrid[0:160, 0:160]
        inside = np.hypot(x - 80, y - 80) < 60
        self.rgba = np.zeros((4, 160, 160, 4), np.uint8)
        for i, colour in enumerate(((220, 40, 40), (40, 40, 220), (40, 160, 60), (200, 200, 40))):
            self.rgba[i, inside] = (*colour, 255)
        self.rows = [
            {"concept": c, "slug": s, "code": s, "set": "noto"}
            for c, s in (("cat", "cat"), ("owl", "owl"), (None, "a"), (None, "b"))
        ]
        self.words = ["cat", "owl"]
        self.of_word = {"cat": [0], "owl": [1]}
        self.wordless = {split: [2, 3] for split in ("train", "validation", "test")}


def test_a_draw_follows_from_seed_and_index_alone(recipe) -> None:
    draw = recipe("draw")
    for index in range(24):
        one, said = draw.draw(Icons(), 1, index)
        two, again = draw.draw(Icons(), 1, index)
        assert one.shape == (128, 128, 3)
        assert one.dtype == np.uint8
        assert (one == two).all()
        assert said == again
    assert not (draw.draw(Icons(), 1, 0)[0] == draw.draw(Icons(), 2, 0)[0]).all()


def test_a_group_shares_look_and_background(recipe) -> None:
    draw = recipe("draw")
    for group in range(12):
        facts = [draw.draw(Icons(), 1, 4 * group + member)[1] for member in range(4)]
        assert len({fact["look"] for fact in facts}) == 1
        assert len({str(fact["ground_colours"]) for fact in facts}) == 1
        assert facts[0]["code"] == facts[2]["code"]


def test_training_never_draws_a_held_out_pair(recipe) -> None:
    draw = recipe("draw")
    icons = Icons()
    icons.words = ["cat", "owl", "fox", "pig", "key", "sun"]
    icons.of_word = {word: [0] for word in icons.words}
    icons.rows[0]["concept"] = None
    rng = np.random.default_rng(0)
    for look in draw.LOOKS:
        picked = [w for w in icons.words if draw.split_of(f"{w}|{look}") == "train"]
        assert picked, look
        icons.of_word = {word: [i] for i, word in enumerate(icons.words)}
        for _ in range(30):
            assert icons.words[draw.choose(icons, rng, "train", look, 0.0)] in picked


def test_a_caption_says_what_it_is_asked_to(recipe) -> None:
    draw = recipe("draw")
    fact = {
        "concept": "owl",
        "count": 2,
        "colours": ("red",),
        "look": "neon",
        "ground": "plain",
        "ground_words": ("blue",),
    }
    rng = np.random.default_rng(0)
    assert draw.caption(fact, rng, (False,) * 4) == ""
    assert draw.caption(fact, rng, (True, False, False, False)) == "two owls"
    whole = draw.caption(fact, rng, (True,) * 4)
    assert all(word in whole for word in ("two red owls", "neon", "on a blue background"))
    assert draw.caption(fact | {"concept": None}, rng, (True, False, False, False)) == ""


def test_another_package_hash_is_refused(recipe, tmp_path: Path) -> None:
    icons = recipe("icons")
    (tmp_path / "noto.tgz").write_bytes(b"changed")
    with pytest.raises(SystemExit, match=r"sources\.json expects"):
        icons.fetch("noto", {"npm": "noto@1", "sha256": "0" * 64}, tmp_path)


def test_a_loop_resumes_and_refuses_another_configuration(recipe, tmp_path: Path) -> None:
    common = recipe("common")

    def loop(settings: str, minutes: float):
        torch.manual_seed(0)
        net = torch.nn.Linear(2, 2)
        return common.Loop(
            tmp_path / "x.pt", minutes, net, common.adamw(net.parameters(), 0.1), common.Ema(net), settings
        )

    first = loop("a", 0.002)
    for _ in first:
        first.learn(first.module(torch.ones(1, 2)).square().sum())
    assert loop("a", 0.002).step == first.step
    with pytest.raises(SystemExit, match="another configuration"):
        loop("b", 0.002)


def test_a_longer_run_goes_on_from_the_plateau(recipe, tmp_path: Path) -> None:
    common = recipe("common")
    net = torch.nn.Linear(2, 2)

    def loop(minutes: float):
        return common.Loop(tmp_path / "x.pt", minutes, net, common.adamw(net.parameters(), 0.1), None, "a")

    first = loop(0.004)
    for _ in first:
        first.learn(net(torch.ones(1, 2)).square().sum())
    longer = loop(0.1)
    assert 0 < longer.step < first.step
    assert longer.factor() > 0.0


def test_the_queue_never_overwrites_a_better_model(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, figures = recipe("chain"), recipe("figures")
    share = {"value": 0.4, "low": 0.3, "high": 0.5, "n": 8}
    monkeypatch.setattr(figures, "measure", lambda *_: {"text alone: concept": share})
    target = tmp_path / "bundled"
    target.mkdir()
    with pytest.raises(SystemExit, match="not trained yet"):
        chain.ship(8, target)
    for part in chain.PARTS:
        (chain.MODEL / part).mkdir(parents=True)
    (target / "figures.json").write_text('{"score": 0.5}')
    with pytest.raises(SystemExit, match="not shipped: score"):
        chain.ship(8, target)
    assert [path.name for path in target.iterdir()] == ["figures.json"]


def test_palette_distance_is_zero_to_itself_and_large_to_another_colour(recipe) -> None:
    judge = recipe("judge")
    red = np.full((128, 128, 3), (220, 30, 30), np.uint8)
    blue = np.full((128, 128, 3), (30, 30, 220), np.uint8)
    assert judge.palette_distance(red, red) == pytest.approx(0, abs=1e-3)
    assert judge.palette_distance(red, blue) > 60


def test_a_wider_autoencoder_computes_the_same(recipe) -> None:
    from diffusers import AutoencoderKL

    vae = recipe("vae")
    torch.manual_seed(0)
    old = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip
    new = vae.widened(old).eval()
    assert new.config.block_out_channels == [12, 24]
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        latents = old.encode(x).latent_dist.mode()
        assert torch.allclose(new.encode(x).latent_dist.mode(), latents, atol=1e-5)
        assert torch.allclose(new.decode(latents).sample, old.decode(latents).sample, atol=1e-5)


def test_training_adds_the_term_that_imprompt_adds(recipe) -> None:
    from diffusers import UNet2DConditionModel

    adapters, joint = recipe("adapters"), recipe("unet")
    unet = UNet2DConditionModel.from_pretrained(adapters.START / "unet").float().eval()
    adapter = adapters.IPAdapter.from_pretrained(adapters.START / "adapters" / adapters.NAMES["plus"])
    adapter.module.float()
    generator = torch.Generator().manual_seed(0)
    x, text, image = (
        torch.randn(shape, generator=generator) for shape in ((3, 4, 16, 16), (3, 32, 256), (3, 16, 256))
    )
    t = torch.tensor([20, 500, 999])
    with torch.no_grad():
        adapter.attach(unet)
        with adapter.training_tokens(image, torch.tensor([0.0, 1.0, 1.0])):
            expected = unet(x, t, text).sample
        adapter.detach()
        joint.decouple(unet, adapter, bare=1)
        found = unet(x, t, torch.cat([text, image], 1)).sample
    assert torch.allclose(found, expected, atol=1e-6)


def write_pool(recipe, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Drawn pictures of seeds 1 and 2 with their facts, and the bundled model as that of the state folder."""
    common, draw, pool = recipe("common"), recipe("draw"), recipe("pool")
    monkeypatch.setattr(pool, "CHUNK", count)
    for seed in (1, 2):
        made = [draw.draw(Icons(), seed, index) for index in range(count)]
        path = pool.chunk_path(seed, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.stack([picture for picture, _ in made]))
        path.with_suffix(".json").write_text(json.dumps([fact for _, fact in made]))
    shutil.copytree(common.START, common.MODEL)


def test_an_adapters_draws_follow_the_recipe(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's plan of the rows: what is shown with what, and what is said."""
    write_pool(recipe, monkeypatch, 64)
    adapters, labels = recipe("adapters"), recipe("labels")
    rows = adapters.drawn(1, 64)
    shown, config = [*rows, *adapters.drawn(2, 8)], adapters.configuration("base", 2500)
    keys = [hashlib.blake2b(row.name.encode(), digest_size=8).hexdigest() for row in shown]
    sizes = [(64, 64)] * len(shown)
    plan = Plan(shown, config, keys=keys, sizes=sizes, per_step=config.batch * config.accumulate)
    batch = plan.samples(range(4000))
    facts = recipe("pool").Pool(1, 64).facts
    said = [labels.captions(fact, 1, index) for index, fact in enumerate(facts)]
    another = 0
    for target, reference, text, mode in zip(
        batch.targets, batch.references, batch.captions, batch.modes, strict=True
    ):
        assert target // 4 == reference // 4
        assert target < 64
        if mode.startswith("manner"):
            another += 1
            assert {target % 4, reference % 4} not in ({0, 2}, {target % 4})
            assert facts[target]["concept"]
            assert text in (said[target][labels.ALONE], said[target][labels.MORE], "")
        else:
            assert reference == target or {target % 4, reference % 4} == {0, 2}
            assert text in (said[target][labels.PARTS], "")
    assert another / 4000 == pytest.approx(0.5, abs=0.12)
    assert batch.image_dropped.float().mean() == pytest.approx(0.08, abs=0.02)


def test_the_products_trainer_makes_the_adapter_and_goes_on(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pool(recipe, monkeypatch, 4)
    adapters, common = recipe("adapters"), recipe("common")
    made = common.MODEL / "adapters" / adapters.NAMES["base"]
    before = load_file(made)
    steps = []
    for count in ("1", "2"):
        words = ["adapters.py", "base", "--steps", count, "--batch", "2", "--most", "4"]
        monkeypatch.setattr(sys, "argv", words)
        adapters.main()
        lines = (common.CHECKPOINTS / "adapter-base" / "log.jsonl").read_text().splitlines()
        steps.append([json.loads(line)["step"] for line in lines if '"loss"' in line])
    assert steps == [[1], [1, 2]]
    after = load_file(made)
    assert after.keys() == before.keys()
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in after.values())
    with safe_open(made, "pt") as file:
        assert file.metadata() == {"format": "pt", "imprompt.variant": "linear"}


def test_draws_pair_a_reference_with_what_shares_its_manner(recipe) -> None:
    supply = recipe("supply")
    made = object.__new__(supply.Supply)  # without pictures to encode
    made.plain, made.size = 8, 8 + 4 * 60
    made.classes = torch.zeros(made.size, 5)
    made.classes[9::7, 0] = -100  # things without a word
    known = torch.nonzero(made.classes[:, 0] >= 0).flatten()
    made.known = known[known >= made.plain]
    generator = torch.Generator().manual_seed(0)
    draws = made.batch(400, 600, generator)
    references, targets = draws.references, draws.targets[400:]
    assert len(references) == len(targets) == 600
    assert (references // 4 == targets // 4).all()
    assert (draws.targets[:400] < made.plain).float().mean() == pytest.approx(supply.PLAIN_SHARE, abs=0.06)
    assert (targets >= made.plain).all()
    alone = draws.captions[400:] == supply.ALONE
    assert (references[alone] != targets[alone]).all()
    assert not ((references % 4 + targets % 4 == 2) & (references % 2 == 0) & alone).any()  # one icon twice
    assert (made.classes[targets[alone], 0] >= 0).all()
    assert 0.04 < (~draws.shown).float().mean() < 0.13


def test_only_the_embeddings_of_motion_words_learn(recipe) -> None:
    motion, text = recipe("motion"), recipe("text")
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(motion.START / "text_encoder").float().requires_grad_(False)
    texts = text.Texts(CLIPTokenizer.from_pretrained(motion.START / "tokenizer"), encoder)
    embeddings = motion.motion_words(texts)
    texts(["a cat bouncing", "an owl sliding left"]).square().sum().backward()
    moved = set(torch.nonzero(embeddings.weight.grad.abs().sum(1)).flatten().tolist())
    words = texts.tokenizer("bouncing sliding left", add_special_tokens=False).input_ids
    assert moved == set(words)


def test_a_deeper_motion_adapter_draws_the_same_until_it_learns(recipe, tmp_path: Path) -> None:
    motion, text = recipe("motion"), recipe("text")
    from diffusers import MotionAdapter, UNet2DConditionModel

    base = UNet2DConditionModel.from_pretrained(text.START / "unet").float().eval()
    torch.manual_seed(0)
    config = dict(MotionAdapter.from_pretrained(text.START / "motion").config)
    shallow = MotionAdapter.from_config(config | {"motion_transformer_layers_per_block": (1, 1, 0)})
    for module in [*shallow.down_blocks[2].motion_modules, *shallow.up_blocks[0].motion_modules]:
        torch.nn.init.zeros_(module.proj_out.weight)  # a level without layers still has its projections
        torch.nn.init.zeros_(module.proj_out.bias)
    shallow.save_pretrained(tmp_path / "shallow")
    deep = motion.deeper(tmp_path / "shallow")
    assert sum(p.numel() for p in deep.parameters()) > sum(p.numel() for p in shallow.parameters())
    x, hidden = torch.randn(1, 4, 6, 16, 16), torch.randn(6, 32, 256)
    with torch.no_grad():
        expected, found = (
            motion.joined(base, adapter).eval()(x, 500, hidden).sample for adapter in (shallow, deep)
        )
    assert torch.allclose(found, expected, atol=1e-6)
    assert all(p.requires_grad for p in deep.parameters())


def test_attention_over_short_clips_is_that_of_the_library(recipe) -> None:
    motion, text = recipe("motion"), recipe("text")
    from diffusers import MotionAdapter, UNet2DConditionModel

    base = UNet2DConditionModel.from_pretrained(text.START / "unet").float().eval()
    unet = motion.joined(base, MotionAdapter.from_pretrained(text.START / "motion").float()).eval()
    torch.manual_seed(0)
    x, hidden = torch.randn(2, 4, 8, 16, 16), torch.randn(16, 32, 256)
    with torch.no_grad():
        expected = unet(x, 500, hidden).sample
        unet.set_attn_processor(motion.ShortAttention())
        found = unet(x, 500, hidden).sample
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_stated_part_of_the_clips_is_shown_as_pure_noise(recipe) -> None:
    motion = recipe("motion")
    times = motion.times_of_clips(1000)
    assert ((times >= 0) & (times < 1000)).all()
    assert (times >= motion.BLIND).float().mean() == pytest.approx(motion.BLIND_CLIPS, abs=0.01)


def test_a_clip_played_backwards_shows_what_its_word_says(recipe) -> None:
    """All but the frame in which nothing is seen, since the thing is out of the picture."""
    motion = recipe("motion")
    for word in motion.MOTIONS:
        order, said = motion.turned(torch.arange(16), word)
        poses = [motion.pose(word, int(number) / 16, 1.0) for number in order]
        for number in set(range(16)) - {8}:
            assert poses[number] == pytest.approx(motion.pose(said, number / 16, 1.0), abs=1e-9), word


def test_the_errors_of_a_clip_are_told_apart_and_add_up(recipe) -> None:
    motion = recipe("motion")
    torch.manual_seed(0)
    target, offset = torch.randn(2, 4, 8, 3, 3), torch.randn(2, 4, 1, 3, 3)
    still, moved = motion.errors(target + offset, target)
    assert torch.allclose(still, offset.square().mean((1, 2, 3, 4)))
    assert moved.max() < 1e-10
    drawn = torch.randn(2, 4, 8, 3, 3)
    still, moved = motion.errors(drawn, target)
    assert torch.allclose(still + moved, (drawn - target).square().mean((1, 2, 3, 4)))


def test_a_motion_is_named_once_somewhere_in_the_caption(recipe) -> None:
    motion = recipe("motion")
    rng = np.random.default_rng(0)
    said = {motion.with_motion("a cat on a blue background, neon style", "spinning", rng) for _ in range(40)}
    assert said == {
        "a cat spinning on a blue background, neon style",
        "a cat on a blue background spinning, neon style",
        "a cat on a blue background, neon style, spinning",
    }
    assert motion.with_motion("", "spinning", rng) == "spinning"


def test_the_words_stage_moves_the_embeddings_of_motion_words_alone(recipe, tmp_path: Path) -> None:
    common, text, words, motion = (recipe(name) for name in ("common", "text", "words", "motion"))
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel.from_pretrained(text.START / "unet").float().eval().requires_grad_(False)
    encoder = CLIPTextModel.from_pretrained(text.START / "text_encoder").float().requires_grad_(False)
    texts = text.Texts(CLIPTokenizer.from_pretrained(text.START / "tokenizer"), encoder)
    readers, embeddings = words.Readers(unet), motion.motion_words(texts)
    before = embeddings.weight.detach().clone()
    learners = torch.nn.ModuleDict({"readers": readers, "words": embeddings})
    optimizer = torch.optim.AdamW(learners.parameters(), lr=1e-2, weight_decay=0.0)
    loop = common.Loop(tmp_path / "words.pt", 0.01, learners, optimizer, warmup=1)
    facts = [motion.clip(Icons(), 1, index)[1] for index in range(2)]
    words.learn(unet, texts, readers, torch.randn(2, 16, 4, 16, 16), facts, loop, 4)
    moved = set(torch.nonzero((embeddings.weight != before).any(1)).flatten().tolist())
    said = texts.tokenizer(" ".join(motion.MOTIONS), add_special_tokens=False).input_ids
    assert moved
    assert moved <= set(said)
    assert loop.log["changed"] > 0
