"""What a scene is, in words and in figures."""

from __future__ import annotations

from typing import Any

from ovi.data.synthetic.scene import Scene

_COUNTS = ("no times", "once", "twice", "three times", "four times", "five times", "six times", "seven times")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")


def caption(scene: Scene) -> str:
    """What is seen and heard in words, the sound between ``<AUDCAP>`` and ``<ENDAUDCAP>`` as Ovi's prompts have it."""
    seen = [f"a {b.size} {b.colour} ball bounces {_word(_COUNTS, len(b.impacts_s), ' times')}" for b in scene.balls]
    heard = [
        f"{_word(_NUMBERS, len(b.impacts_s))} {b.pitch} pitched knock{'' if len(b.impacts_s) == 1 else 's'}"
        for b in scene.balls
    ]
    picture = f"{' and '.join(seen)} on the floor."
    sound = f"{' and '.join(heard)}, one at each bounce."
    return f"{picture[0].upper()}{picture[1:]} <AUDCAP>{sound[0].upper()}{sound[1:]}<ENDAUDCAP>"


def truth(scene: Scene) -> dict[str, Any]:
    """The scene's facts as JSON-ready data; figures of a single ball stand at the top level too."""
    facts: dict[str, Any] = {
        "impacts_s": list(scene.impacts_s),
        "count": len(scene.impacts_s),
        "num_balls": len(scene.balls),
        "duration_s": scene.duration_s,
        "balls": [
            {
                "colour": b.colour,
                "size": b.size,
                "pitch": b.pitch,
                "pitch_hz": b.pitch_hz,
                "impacts_s": list(b.impacts_s),
                "strengths": list(b.strengths),
                "gravity": b.gravity,
                "restitution": b.restitution,
            }
            for b in scene.balls
        ],
    }
    if len(scene.balls) == 1:
        facts.update({k: facts["balls"][0][k] for k in ("colour", "size", "pitch", "pitch_hz")})
    return facts


def _word(words: tuple[str, ...], number: int, unit: str = "") -> str:
    return words[number] if number < len(words) else f"{number}{unit}"
