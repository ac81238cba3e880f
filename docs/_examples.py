"""Draw what the three examples of the server's page promise, as the page asks for them.

Run from the repository's root, after the bundled model has changed: ``python docs/_examples.py``.
"""

from pathlib import Path

import imprompt.app.server
from imprompt import Engine, Request
from imprompt.encoders.images import load_image

FOLDER = Path(imprompt.app.server.__file__).parent / "static" / "examples"
EXAMPLES = (("an owl on a yellow background", ""), ("a heart", "cactus-neon"), ("a house", "sunset"))
"""As in static/main.js."""


def main() -> None:
    engine = Engine()
    for number, (text, shown) in enumerate(EXAMPLES, 1):
        pictures = {shown: load_image(FOLDER / f"{shown}.webp")} if shown else {}
        request = Request(prompt=text, images=tuple(pictures), steps=20, seed=7)
        drawn = engine.run(request, pictures=pictures).images[0]
        drawn.save(FOLDER / f"drawn-{number}.webp", quality=85, method=6)


if __name__ == "__main__":
    main()
