"""OpenAI's own Python client, unchanged, against the served bundled model."""

import base64
import io

import httpx
import openai
import pytest
from PIL import Image

from imprompt.app.server.settings import Settings
from serving import STEPS, Running, encoded, picture, start

SMALL = {"steps": STEPS, "seed": 4}


@pytest.fixture
def theirs(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)


def opened(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def named(content: bytes, name: str = "picture.png") -> tuple[str, bytes, str]:
    return name, content, "image/png"


def transparent_hole(size: tuple[int, int] = (128, 128)) -> bytes:
    image = Image.new("RGBA", size, (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (32, 32, 96, 96))
    return encoded(image)


def test_quality_is_a_factor_of_the_bases_own_steps(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "mine" / "defaults.json").write_text('{"steps": 8}')
    offered = Settings(tmp_path, devices=(), download=True, bases={"mine": str(tmp_path / "mine")})
    running = start(offered, ready=False)
    try:
        asked = (
            ("flux-schnell", "high", 6),
            ("emoji", "low", 10),
            ("emoji", "auto", None),
            ("mine", "low", 4),
        )
        for model, quality, expected in asked:
            body = {"prompt": "a cat", "model": model, "quality": quality, "stream": True}
            with (
                running.client(headers={"X-Client-Id": quality + model}) as client,
                client.stream("POST", "/v1/images/generations", json=body),  # whose end would cancel the job
            ):
                [job] = running.queue.unfinished(f"127.0.0.1 {quality}{model}")
            assert job.request.steps == expected
    finally:
        running.stop()


def test_generates_from_a_text_under_any_of_their_names(theirs: openai.OpenAI) -> None:
    answer = theirs.images.generate(prompt="a cat", model="gpt-image-1", n=2, extra_body={"imprompt": SMALL})
    assert answer.data is not None
    assert len(answer.data) == 2
    assert opened(answer.data[0].b64_json).size == (128, 128)
    assert answer.data[0].b64_json != answer.data[1].b64_json
    assert (answer.size, answer.output_format) == ("128x128", "png")


def test_size_and_format_are_kept(theirs: openai.OpenAI) -> None:
    answer = theirs.images.generate(
        prompt="a cat", size="64x96", output_format="webp", extra_body={"imprompt": SMALL}
    )
    drawn = opened(answer.data[0].b64_json)  # type: ignore[index]
    assert (drawn.size, drawn.format) == ((64, 96), "WEBP")


def test_pictures_without_a_mask_are_image_prompts(theirs: openai.OpenAI) -> None:
    def edit(pictures: list[bytes], **options: str) -> str | None:
        answer = theirs.images.edit(
            image=[named(content) for content in pictures],
            prompt="an owl",
            extra_body={"imprompt": SMALL},
            **options,  # type: ignore[arg-type]
        )
        return answer.data[0].b64_json  # type: ignore[index]

    one, two = edit([picture("red")]), edit([picture("red"), picture("blue")])
    strong = edit([picture("red")], input_fidelity="high")
    assert len({one, two, strong}) == 3


def test_a_mask_is_inpainted_where_it_is_transparent(theirs: openai.OpenAI) -> None:
    before = picture("red")
    answer = theirs.images.edit(
        image=named(before), mask=named(transparent_hole()), prompt="a star", extra_body={"imprompt": SMALL}
    )
    drawn, given = opened(answer.data[0].b64_json).convert("RGB"), Image.open(io.BytesIO(before))  # type: ignore[index]
    assert drawn.crop((0, 0, 128, 32)).tobytes() == given.crop((0, 0, 128, 32)).tobytes()
    assert drawn.crop((32, 32, 96, 96)).tobytes() != given.crop((32, 32, 96, 96)).tobytes()


def test_streams_partial_pictures_then_the_picture(theirs: openai.OpenAI) -> None:
    stream = theirs.images.generate(
        prompt="a cat", stream=True, partial_images=2, extra_body={"imprompt": {"steps": 12, "seed": 4}}
    )
    told = list(stream)
    kinds = [event.type for event in told]
    assert kinds[-1] == "image_generation.completed"
    assert 1 <= kinds.count("image_generation.partial_image") <= 2
    assert opened(told[-1].b64_json).size == (128, 128)


def test_urls_can_be_asked_for(theirs: openai.OpenAI, running: Running) -> None:
    answer = theirs.images.generate(
        prompt="a cat", model="dall-e-3", response_format="url", extra_body={"imprompt": SMALL}
    )
    url = answer.data[0].url  # type: ignore[index]
    assert url is not None
    assert url.startswith(running.url)


def test_lists_models(theirs: openai.OpenAI) -> None:
    assert "emoji" in [model.id for model in theirs.models.list()]
    assert theirs.models.retrieve("emoji").id == "emoji"


def test_errors_are_theirs(theirs: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        theirs.images.generate(prompt="a cat", model="stable-cascade")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError) as wrong:
        theirs.images.generate(prompt="a cat", extra_body={"imprompt": {"steps": -1}})
    assert "steps" in str(wrong.value)
    with pytest.raises(openai.BadRequestError) as moving:
        theirs.images.generate(prompt="a cat", extra_body={"imprompt": {"task": "animate", **SMALL}})
    assert moving.value.param == "imprompt.task"
    with pytest.raises(openai.BadRequestError) as opaque:
        theirs.images.edit(image=named(picture()), mask=named(picture()), prompt="x")
    assert opaque.value.param == "mask"


def test_lists_and_objects_beside_pictures_are_fields_of_the_request(
    theirs: openai.OpenAI, running: Running
) -> None:
    """Their client writes each of them in brackets, a list of objects key by key."""
    own = {**SMALL, "size": [64, 96], "negative": "123", "images": [{"scale": 0.1}, {"scale": 0.3}]}
    pictures = [named(picture("red")), named(picture("blue"))]
    answer = theirs.images.edit(image=pictures, prompt="an owl", size="auto", extra_body={"imprompt": own})
    assert opened(answer.data[0].b64_json).size == (64, 96)  # type: ignore[index]
    with running.client() as client:
        request = client.get("/api/v1/history?limit=1").json()["jobs"][0]["request"]
    assert [prompt["scale"] for prompt in request["images"]] == [0.1, 0.3]
    assert request["negative"] == "123"


@pytest.mark.parametrize(
    ("own", "status", "field"),
    [
        ({"images": [{"sclae": 0.1}, {"sclae": 0.1}]}, 422, "images"),
        ({"images": [{"scale": 0.1}, {"profile": "style"}]}, 400, "imprompt.images"),
        ({"images": [{}, {"scale": 0.1}]}, 400, "imprompt.images"),
        ({"images": [{"scale": 0.1, "profile": "style"}, {"scale": 0.1}]}, 400, "imprompt[images]"),
        ({"images": [{"profile": [1, 0]}, {"profile": [0, 1]}]}, 400, "imprompt[images]"),
    ],
)
def test_options_that_belong_to_nothing_are_refused(
    theirs: openai.OpenAI, own: dict, status: int, field: str
) -> None:
    pictures = [named(picture("red")), named(picture("blue"))]
    with pytest.raises(openai.APIStatusError) as refused:
        theirs.images.edit(image=pictures, prompt="an owl", extra_body={"imprompt": {**SMALL, **own}})
    assert refused.value.status_code == status
    assert (refused.value.param or "").startswith(field)  # type: ignore[attr-defined]


def test_brackets_that_do_not_close_are_refused(client: httpx.Client) -> None:
    for name in ("imprompt[steps", "imprompt[]", "imprompt[size][0]x", "imprompt[a][][]"):
        answer = client.post(
            "/v1/images/edits", data={"prompt": "a", name: "2"}, files={"image": named(picture())}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"seed": 1}, "seed: send it inside 'imprompt', as {'imprompt': {'seed': …}}."),
        ({"negative_prompt": "red"}, "negative_prompt: this server has no such parameter."),
        ({"image": "aGk="}, "image: pictures are sent as files, to images/edits."),
    ],
)
def test_a_parameter_in_the_wrong_place_is_refused(theirs: openai.OpenAI, sent: dict, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        theirs.images.generate(prompt="a cat", extra_body={**sent, "imprompt": SMALL})
    assert wrong.value.body["message"] == said  # type: ignore[index]


def test_their_parameters_without_effect_are_taken(theirs: openai.OpenAI) -> None:
    drawn = theirs.images.generate(
        prompt="a cat",
        user="me",
        style="vivid",
        moderation="low",
        extra_body={"imprompt": SMALL, "safety_identifier": "me"},
    )
    assert opened(drawn.data[0].b64_json).size == (128, 128)
