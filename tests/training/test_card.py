"""The model card of a run: the same figures as Markdown and as one HTML page."""

from imprompt.training.card import Card, html, markdown, noted
from imprompt.training.config import TrainConfig

ABOUT = {
    "imprompt.base": "some/base", "imprompt.image_encoder": "", "imprompt.data": "ab12",
    "imprompt.pictures": "7", "imprompt.start": "new weights",
}  # fmt: skip


def record(step, loss):
    return {
        "step": step, "validation_with_image": loss, "validation_without_image": 0.5,
        "validation_bare_base": 0.6,
    }  # fmt: skip


def card(*figures, kept):
    return Card(TrainConfig(data="d", output="runs/a <b>", kind="plus"), ABOUT, figures, kept)


def test_both_cards_say_base_figures_and_settings():
    last = record(20, 0.25)
    page = card(record(0, 0.4), record(10, 0.3), last, kept=last)
    for text in (markdown(page), html(page)):
        assert all(said in text for said in ("some/base", "0.4000", "0.2500", "step 20", "ab12", "drop_text"))
        assert "0.3000" not in text
    assert "base_model: some/base" in markdown(page)


def test_names_are_escaped_in_html_and_the_curve_stays_on_its_page():
    text = html(card(record(0, 0.4), record(5, 0.4), kept=None))
    assert "<b>" not in text
    assert "a &lt;b&gt;" in text
    assert "nan" not in text


def test_the_cards_command_names_the_adapter_where_the_reader_has_it():
    mine = TrainConfig(data="d", output="runs/my BODY", kind="plus")
    card = Card(mine, ABOUT, [], None)
    assert card.command.endswith("--base some/base --adapter 'runs/my BODY'")
    assert "<title>my BODY</title>" in html(card)
    shared = Card(mine.replace(push_to_hub="me/it"), ABOUT | {"imprompt.base": "a b"}, [], None)
    assert shared.command.endswith("--base 'a b' --adapter me/it/ip-adapter.safetensors")
    assert Card(mine.replace(output="."), ABOUT, [], None).title


def test_a_run_that_never_beat_its_start_says_so():
    first = record(0, 0.4)
    assert "No step was better" in markdown(card(first, record(9, 0.5), kept=first))
    assert "No step was better" not in markdown(card(first, kept=record(9, 0.3)))


def test_a_run_without_validation_has_a_card_and_metadata():
    assert "Loss on held-out" not in html(card(kept=None))
    assert set(noted(TrainConfig(data="d", output="o"), [])) == {"imprompt.settings"}
